"""Normalization that keeps the normalized input in 16, 8 or 4 bits. Outputs, statistics and running buffers are exact.

The normalized input, and not the input, is what is quantized: a channel's mean, however far from zero, costs no steps.
With it PyTorch's own backward is called, for a mean of 0 and a deviation of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dropit.layers.layer import QuantizedLayer, first_order_only
from dropit.layers.table import register
from dropit.packer import Packer
from dropit.stored import Stored, offer

_aten = torch.ops.aten


class _NormFunction(Function):
    """y = (x - mean) / deviation * weight + bias, computed by the caller. Saves what is stored of the normalized x."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        rstd: Tensor,
        shape: tuple[int, ...],
        restore: Callable[..., Tensor],
        *stored: Tensor | None,
    ) -> Tensor:
        """Give ``output`` its place in the graph; ``shape``: that which is normalized over, where it is by sample."""
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the weight, 1 / deviation and what is stored of the normalized input."""
        _, weight, bias, computed, rstd, ctx.shape, ctx.restore, *stored = inputs
        ctx.mark_dirty(computed)
        ctx.save_for_backward(weight, bias, rstd, *stored)

    @staticmethod
    def saved(ctx: Any) -> tuple[Any, ...]:
        """Weight, bias, 1 / deviation, the normalized input, and which gradients are wanted."""
        weight, bias, rstd, *stored = ctx.saved_tensors
        return weight, bias, rstd, ctx.restore(*stored), ctx.needs_input_grad[:3]

    @staticmethod
    def gradients(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The three gradients, not to be differentiated again, and none for the rest."""
        once = [None if grad is None else first_order_only(grad) for grad in grads]
        return *once, *[None] * 7


class DropITBatchNormFunction(_NormFunction):
    """By channel, over the batch."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, C, *spatial)."""
        weight, _, rstd, normalized, wanted = _NormFunction.saved(ctx)
        scale = rstd if weight is None else weight * rstd  # of a deviation of 1
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        grads = _aten.native_batch_norm_backward(
            grad_output, normalized, scale, None, None, zeros, ones, True, 0.0, wanted
        )
        return _NormFunction.gradients(*grads)


class DropITLayerNormFunction(_NormFunction):
    """By sample, over the last dimensions."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., *normalized_shape)."""
        weight, bias, rstd, normalized, wanted = _NormFunction.saved(ctx)
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        grads = _aten.native_layer_norm_backward(grad_output, normalized, ctx.shape, zeros, ones, weight, bias, wanted)
        grad_input = grads[0].mul_(rstd) if wanted[0] else None
        return _NormFunction.gradients(grad_input, *grads[1:])


class DropITGroupNormFunction(_NormFunction):
    """By sample, over groups of channels."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, C, *spatial)."""
        weight, _, rstd, normalized, wanted = _NormFunction.saved(ctx)
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        samples, channels = grad_output.shape[:2]
        size = grad_output.numel() // (samples * channels)
        form = (samples, channels, size, rstd.shape[1])
        grads = _aten.native_group_norm_backward(
            grad_output.contiguous(), normalized, zeros, ones, weight, *form, wanted
        )
        grad_input = None
        if wanted[0]:
            grad_input = grads[0].view(samples, rstd.shape[1], -1).mul_(rstd.unsqueeze(2)).view(grad_output.shape)
        return _NormFunction.gradients(grad_input, *grads[1:])


class DropITRMSNormFunction(_NormFunction):
    """By sample, over the last dimensions, without a mean (Zhang and Sennrich 2019, equation 4)."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., *normalized_shape)."""
        weight, _, rstd, normalized, wanted = _NormFunction.saved(ctx)
        dims = list(range(-len(ctx.shape), 0))
        grad_input = grad_weight = None
        if wanted[0]:
            inner = grad_output if weight is None else grad_output * weight
            grad_input = (inner - normalized * (inner * normalized).mean(dim=dims, keepdim=True)) * rstd
            grad_input = grad_input.to(grad_output.dtype)
        if wanted[1]:
            rows = list(range(grad_output.dim() - len(dims)))
            grad_weight = (grad_output * normalized).sum(dim=rows) if rows else grad_output * normalized
        return _NormFunction.gradients(grad_input, grad_weight, None)


class _DropITBatchNorm(QuantizedLayer, nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C) or (N, C, *spatial)."""
        if not self.packs(input) or input.numel() == input.shape[1]:  # one value a channel is PyTorch's error
            return self.passes_on(super().forward(input))
        self._check_input_dim(input)
        return dropit_batch_norm(input, self, self._dropit_packer)


def dropit_batch_norm(input: Tensor, layer: nn.modules.batchnorm._BatchNorm, packer: Packer) -> Tensor:
    """What ``layer`` computes in training, with the normalized input kept in ``packer.bits`` bits."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    buffers = (layer.running_mean, layer.running_var) if layer.track_running_stats else (None, None)
    with torch.no_grad():
        x = input.detach()
        output, mean, rstd = torch.native_batch_norm(x, layer.weight, layer.bias, *buffers, True, momentum, layer.eps)
        by_channel = (-1, *[1] * (x.dim() - 2))
        shift, scale = (-mean * rstd).view(by_channel), rstd.view(by_channel)
        normalized = torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))
    tensors = (input, layer.weight, layer.bias, output, rstd)
    return _in_graph(DropITBatchNormFunction, tensors, (), normalized, packer, by_channel)


@register
class DropITBatchNorm1d(_DropITBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d that keeps 16, 8 or 4 bits per element."""

    plain = nn.BatchNorm1d


@register
class DropITBatchNorm2d(_DropITBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps 16, 8 or 4 bits per element."""

    plain = nn.BatchNorm2d


@register
class DropITBatchNorm3d(_DropITBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d that keeps 16, 8 or 4 bits per element."""

    plain = nn.BatchNorm3d


@register
class DropITLayerNorm(QuantizedLayer, nn.LayerNorm):
    """nn.LayerNorm that keeps 16, 8 or 4 bits per element."""

    plain = nn.LayerNorm

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., *normalized_shape)."""
        if not self.packs(input):
            return self.passes_on(super().forward(input))
        return dropit_layer_norm(input, self, self._dropit_packer)


def dropit_layer_norm(input: Tensor, layer: nn.LayerNorm, packer: Packer) -> Tensor:
    """What ``layer`` computes of (..., C), with the normalized input kept in ``packer.bits`` bits."""
    x, w, b = _in_float(input, layer.weight, layer.bias)
    shape = layer.normalized_shape
    with torch.no_grad():
        output, mean, rstd = torch.native_layer_norm(x, shape, w, b, layer.eps)
        normalized = ((x - mean) * rstd).to(x.dtype)
    return _in_graph(DropITLayerNormFunction, (x, w, b, output, rstd), tuple(shape), normalized, packer)


def dropit_layer_norm_2d(input: Tensor, layer: nn.LayerNorm, packer: Packer) -> Tensor:
    """The same over the channels of (N, C, H, W)."""
    return dropit_layer_norm(input.permute(0, 2, 3, 1), layer, packer).permute(0, 3, 1, 2)


@register
class DropITGroupNorm(QuantizedLayer, nn.GroupNorm):
    """nn.GroupNorm that keeps 16, 8 or 4 bits per element."""

    plain = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, *spatial)."""
        if not self.packs(input) or input.numel() == 0:
            return self.passes_on(super().forward(input))
        x, w, b = _in_float(input, self.weight, self.bias)
        samples, channels = x.shape[:2]
        with torch.no_grad():
            form = (samples, channels, x.numel() // (samples * channels), self.num_groups)
            dense = x if x.is_contiguous(memory_format=torch.channels_last) and not x.is_cuda else x.contiguous()
            output, mean, rstd = torch.native_group_norm(dense, w, b, *form, self.eps)
            groups = x.reshape(samples, self.num_groups, -1)
            normalized = ((groups - mean.unsqueeze(2)) * rstd.unsqueeze(2)).view(x.shape).to(x.dtype)
        by_channel = (-1, *[1] * (x.dim() - 2))
        return _in_graph(
            DropITGroupNormFunction, (x, w, b, output, rstd), (), normalized, self._dropit_packer, by_channel
        )


@register
class DropITRMSNorm(QuantizedLayer, nn.RMSNorm):
    """nn.RMSNorm that keeps 16, 8 or 4 bits per element."""

    plain = nn.RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *normalized_shape)."""
        if not self.packs(x):
            return self.passes_on(super().forward(x))
        x, w, _ = _in_float(x, self.weight, None)
        with torch.no_grad():
            output = F.rms_norm(x, self.normalized_shape, w, self.eps)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            dims = list(range(-len(self.normalized_shape), 0))
            rstd = (wide.square().mean(dim=dims, keepdim=True) + eps).rsqrt()
            normalized = (wide * rstd).to(x.dtype)
        shape = tuple(self.normalized_shape)
        return _in_graph(DropITRMSNormFunction, (x, w, None, output, rstd), shape, normalized, self._dropit_packer)


def _in_graph(
    function: type[_NormFunction],
    tensors: tuple[Any, ...],
    shape: tuple[int, ...],
    normalized: Tensor,
    packer: Packer,
    by_channel: tuple[int, ...] | None = None,
) -> Tensor:
    """``function`` of (input, weight, bias, output, 1 / deviation), and its output on offer to who reads it.

    ``by_channel``: the weight's shape that broadcasts to the input, where it does not by itself.
    """
    stored = Stored.of(packer.quantize(normalized, "normalized"))
    output = function.apply(*tensors, shape, *stored.arguments)
    # Copies: a sharded layer's own are there for its own backward pass only, and an optimizer may change them.
    affine = [None if tensor is None else tensor.detach().clone() for tensor in tensors[1:3]]
    if by_channel is not None:
        affine = [None if tensor is None else tensor.view(by_channel) for tensor in affine]
    return offer(output, packer.offer(stored.then(_scaled, *affine)))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _in_float(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As autocast on a GPU has these layers computed; on the CPU it leaves them alone."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype is not torch.float64:
        return x.float(), *(None if tensor is None else tensor.float() for tensor in (weight, bias))  # type: ignore[return-value]
    return x, weight, bias
