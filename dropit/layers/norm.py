"""Normalization that saves the normalized input in 16 to 2 bits. Outputs, statistics and running buffers are exact.

The normalized input, and not the input, is what is quantized: a channel's mean, however far from zero, costs no codes.
With it PyTorch's own backward is called, for a mean of 0 and a deviation of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.formats import in_format, suggest_memory_format
from dropit.layers.function import (
    LayerFunction,
    anchor,
    apply,
    first_order_only,
    none_for_none,
    undefined_gradients_as_none,
)
from dropit.layers.functions import Call, is_of_parameter, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import register, swap_class
from dropit.ops import Statistics
from dropit.packed import is_dense_in_memory, keep_dense, memory_order
from dropit.rematerialize import Published
from dropit.saved import Recipe, Saved
from dropit.saver import Saver
from dropit.tracing import is_traced

_aten = torch.ops.aten


class BackwardForm(NamedTuple):
    """Arguments of a backward pass besides tensors.

    ``saves_weight``, ``saves_bias``: whether PyTorch saves it, so that to change it before the backward pass is an
    error; to change one that is not saved is none.
    """

    shape: tuple[int, ...] = ()  # that is normalized over, where it is by sample
    statistics: torch.dtype = torch.float32  # of the mean and 1 / deviation that PyTorch's operator takes
    memory_format: torch.memory_format = torch.contiguous_format
    saves_weight: bool = True
    saves_bias: bool = False


class _NormFunction(LayerFunction):
    """y = (x - mean) / deviation * weight + bias, computed by the caller. Saves what restores the normalized x."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        rstd: Tensor,
        form: BackwardForm,
        anchor: Tensor | None,
        recipe: Recipe,
        *saved: Tensor | None,
    ) -> Tensor:
        """Give ``output`` its place in the graph."""
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save weight and bias where PyTorch does, 1 / deviation and what restores the normalized input."""
        undefined_gradients_as_none(ctx)
        _, weight, bias, computed, rstd, ctx.form, anchor, ctx.recipe, *saved = inputs
        ctx.mark_dirty(computed)
        weight, bias = weight if ctx.form.saves_weight else None, bias if ctx.form.saves_bias else None
        ctx.save_for_backward(weight, bias, anchor, rstd, *saved)

    @staticmethod
    def saved(ctx: Any) -> tuple[Any, ...]:
        """Weight, bias, what was given as anchor, 1 / deviation, and the normalized input."""
        weight, bias, anchor, rstd, *saved = ctx.saved_tensors
        return weight, bias, anchor, rstd, ctx.recipe.restore(*saved)

    @staticmethod
    def gradients(ctx: Any, anchor: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of three gradients those that are wanted, not to be differentiated again, and none for the rest.

        PyTorch's operators on a GPU return some that are not.
        """
        pairs = zip(grads, ctx.needs_input_grad[:3], strict=True)
        once = [first_order_only(grad, anchor) if wanted and grad is not None else None for grad, wanted in pairs]
        return *once, *[None] * (len(ctx.needs_input_grad) - 3)


class DropITBatchNormFunction(_NormFunction):
    """By channel, over the batch."""

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, C, *spatial)."""
        weight, _, anchor, rstd, normalized = _NormFunction.saved(ctx)
        scale = _wide(rstd) if weight is None else _wide(weight) * _wide(rstd)  # of a deviation of 1
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        grad = _laid_out_alike(grad_output, normalized)
        grads = _aten.native_batch_norm_backward(
            grad, normalized, scale, None, None, zeros, ones, True, 0.0, ctx.needs_input_grad[:3]
        )
        return _NormFunction.gradients(ctx, anchor, *grads)


class DropITLayerNormFunction(_NormFunction):
    """By sample, over the last dimensions."""

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., *normalized_shape)."""
        weight, bias, anchor, rstd, normalized = _NormFunction.saved(ctx)
        wanted, form = ctx.needs_input_grad[:3], ctx.form
        zeros, ones = _mean_and_rstd(rstd, form)
        grads = _aten.native_layer_norm_backward(grad_output, normalized, form.shape, zeros, ones, weight, bias, wanted)
        grad_input = grads[0].mul_(rstd) if wanted[0] else None
        return _NormFunction.gradients(ctx, anchor, grad_input, *grads[1:])


class DropITGroupNormFunction(_NormFunction):
    """By sample, over groups of channels."""

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, C, *spatial)."""
        weight, _, anchor, rstd, normalized = _NormFunction.saved(ctx)
        wanted, form = ctx.needs_input_grad[:3], ctx.form
        zeros, ones = _mean_and_rstd(rstd, form)
        sizes = _group_sizes(grad_output, rstd.shape[1])
        grad, normalized = (in_format(x, form.memory_format) for x in (grad_output, normalized))
        grads = _aten.native_group_norm_backward(grad, normalized, zeros, ones, weight, *sizes, wanted)
        grad_input = grads[0].mul_(_by_channel(rstd, grad_output)) if wanted[0] else None
        return _NormFunction.gradients(ctx, anchor, grad_input, *grads[1:])


class DropITRMSNormFunction(_NormFunction):
    """By sample, over the last dimensions, without a mean (Zhang and Sennrich 2019, equation 4)."""

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., *normalized_shape). As PyTorch's, in float32 where the input is in half precision."""
        weight, _, anchor, rstd, normalized = _NormFunction.saved(ctx)
        dims = list(range(-len(ctx.form.shape), 0))
        grad = grad_output.to(rstd.dtype)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            inner = grad if weight is None else grad * weight
            grad_input = (inner - normalized * (inner * normalized).mean(dim=dims, keepdim=True)) * rstd
            grad_input = grad_input.to(grad_output.dtype)
        if ctx.needs_input_grad[1]:
            rows = list(range(grad.dim() - len(dims)))
            grad_weight = (grad * normalized).sum(dim=rows) if rows else grad * normalized
        return _NormFunction.gradients(ctx, anchor, grad_input, grad_weight, None)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_and_rstd(rstd: Tensor, form: BackwardForm) -> tuple[Tensor, Tensor]:
    """A mean of 0 and 1 / deviation of 1."""
    return torch.zeros_like(rstd, dtype=form.statistics), torch.ones_like(rstd, dtype=form.statistics)


def _laid_out_alike(grad: Tensor, input: Tensor) -> Tensor:
    """``grad`` in the layout of ``input``: PyTorch's backward on the CPU errs for a batch of 1 with another."""
    if grad.device.type != "cpu" or is_traced():
        return grad
    strides = zip(grad.shape, grad.stride(), input.stride(), strict=True)
    if all(size == 1 or one == other for size, one, other in strides):
        return grad
    return torch.empty_like(input).copy_(grad)


def _group_sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Samples, channels, elements of a channel, groups."""
    samples, channels = x.shape[:2]
    return samples, channels, math.prod(x.shape[2:]), groups


def _by_channel(statistic: Tensor, like: Tensor) -> Tensor:
    """(N, groups) -> (N, C, 1, ...), to broadcast to ``like``."""
    samples, channels = like.shape[:2]
    each = statistic.unsqueeze(2).expand(samples, statistic.shape[1], channels // statistic.shape[1])
    return each.reshape(samples, channels, *[1] * (like.dim() - 2))


class _DropITBatchNorm(DropITLayer, nn.modules.batchnorm._BatchNorm):
    quantizes = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C) or (N, C, *spatial)."""
        if not self.saves(input) or not has_batches(input):
            return self.publish_unsaved(super().forward(input))
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        buffers = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return dropit_batch_norm(input, *buffers, self.weight, self.bias, momentum, self.eps, saver=self._dropit_saver)


def has_batches(input: Tensor) -> bool:
    """Whether there are several values a channel; PyTorch has a way, or an error, where there are not."""
    return input.is_floating_point() and input.dim() > 1 and input.numel() not in (0, input.shape[1])


def dropit_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    saver: Saver,
) -> Tensor:
    """Compute ``F.batch_norm`` in training, and save the normalized input in ``saver.bits`` bits."""
    buffers = running_mean, running_var
    if any(x is not None and x.numel() != input.shape[1] for x in (*buffers, weight, bias)):
        # PyTorch's error: the operator below checks nothing, and reads and writes beyond the end.
        return F.batch_norm(input, *buffers, weight, bias, True, momentum, eps)
    with torch.no_grad():
        x = input.detach()
        # What F.batch_norm calls: it decides between cuDNN and PyTorch's own kernels.
        computed = torch._batch_norm_impl_index(
            x, weight, bias, *buffers, True, momentum, eps, torch.backends.cudnn.enabled
        )
        output, mean, rstd = computed[:3]
        by_channel = (-1, *[1] * (x.dim() - 2))
        saved = _save_normalized(x, _wide(mean), _wide(rstd), by_channel, _in_a_row(x, 1), saver)
    tensors = (input, weight, bias, output, rstd)
    return _in_graph(DropITBatchNormFunction, tensors, BackwardForm(), saved, saver, by_channel)


DropITBatchNorm1d, DropITBatchNorm2d, DropITBatchNorm3d = (
    swap_class(_DropITBatchNorm, plain) for plain in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
)


@register
class DropITLayerNorm(DropITLayer, nn.LayerNorm):
    """nn.LayerNorm that saves 16 to 2 bits per element."""

    plain = nn.LayerNorm
    quantizes = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., *normalized_shape)."""
        if not self.saves(input):
            return self.publish_unsaved(super().forward(input))
        return dropit_layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, saver=self._dropit_saver
        )


def dropit_layer_norm(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, *, saver: Saver
) -> Tensor:
    """Compute ``F.layer_norm`` of (..., *shape), and save the normalized input in ``saver.bits`` bits."""
    x, w, b = _in_float("layer_norm", input, weight, bias)
    with torch.no_grad():
        output, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        form = BackwardForm(tuple(shape), mean.dtype, saves_bias=True)
        if mean.dtype.itemsize < 4:  # in half precision on the CPU it computes with better ones than it returns
            _, mean, rstd = torch.native_layer_norm(_wide(x), shape, None, None, eps)
        saved = _save_normalized(x.detach(), mean, rstd, mean.shape, _samplewise(x, rstd), saver)
    return _in_graph(DropITLayerNormFunction, (x, w, b, output, rstd), form, saved, saver)


@register
class DropITGroupNorm(DropITLayer, nn.GroupNorm):
    """nn.GroupNorm that saves 16 to 2 bits per element."""

    plain = nn.GroupNorm
    quantizes = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, *spatial)."""
        if not self.saves(input) or input.numel() == 0:
            return self.publish_unsaved(super().forward(input))
        return dropit_group_norm(input, self.num_groups, self.weight, self.bias, self.eps, saver=self._dropit_saver)


def dropit_group_norm(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, saver: Saver
) -> Tensor:
    """Compute ``F.group_norm`` of (N, C, *spatial), and save the normalized input in ``saver.bits`` bits."""
    x, w, b = _in_float("group_norm", input, weight, bias)
    sizes = _group_sizes(x, groups)
    with torch.no_grad():
        memory_format = torch.contiguous_format if x.is_cuda else suggest_memory_format(x)
        dense = in_format(x, memory_format)
        output, mean, rstd = torch.native_group_norm(dense, w, b, *sizes, eps)
        form = BackwardForm((), mean.dtype, memory_format)
        if mean.dtype.itemsize < 4:
            _, mean, rstd = torch.native_group_norm(_wide(dense), None, None, *sizes, eps)
        inner = _samplewise(dense, rstd) if saver.policy.narrows(dense) else 0
        by_group = (mean, rstd) if inner else (_by_channel(mean, dense), _by_channel(rstd, dense))
        shape = (*by_group[1].shape[:2], *[1] * (x.dim() - 2))
        saved = _save_normalized(dense, *by_group, shape, inner, saver)
    by_channel = (-1, *[1] * (x.dim() - 2))
    return _in_graph(DropITGroupNormFunction, (x, w, b, output, rstd), form, saved, saver, by_channel)


@register
class DropITRMSNorm(DropITLayer, nn.RMSNorm):
    """nn.RMSNorm that saves 16 to 2 bits per element."""

    plain = nn.RMSNorm
    quantizes = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *normalized_shape)."""
        if not self.saves(x) or x.dtype not in _DEFAULT_EPS:
            return self.publish_unsaved(super().forward(x))
        return dropit_rms_norm(x, self.normalized_shape, self.weight, self.eps, saver=self._dropit_saver)


def dropit_rms_norm(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None, *, saver: Saver
) -> Tensor:
    """Compute ``F.rms_norm`` of (..., *shape), and save the normalized input in ``saver.bits`` bits."""
    x, w, _ = _in_float("rms_norm", input, weight, None)
    with torch.no_grad():
        output = F.rms_norm(x, list(shape), w, eps)
        dims = list(range(-len(shape), 0))
        rstd = (
            _wide(x).square().mean(dim=dims, keepdim=True) + (_DEFAULT_EPS[x.dtype] if eps is None else eps)
        ).rsqrt()
        saved = _save_normalized(x.detach(), None, rstd, rstd.shape, _samplewise(x, rstd), saver)
    form = BackwardForm(tuple(shape), saves_weight=x.requires_grad)
    return _in_graph(DropITRMSNormFunction, (x, w, None, output, rstd), form, saved, saver)


def _default_eps(dtype: torch.dtype) -> float:
    """What ``F.rms_norm`` adds if it is given no eps: the dtype's in some versions of PyTorch, float32's in others."""
    x = 2.0**-10
    seen = F.rms_norm(torch.tensor([x], dtype=dtype, device="cpu"), (1,)).item()  # x / (x^2 + eps)^(1/2)
    known = {torch.finfo(kind).eps for kind in (dtype, torch.promote_types(dtype, torch.float32))}
    return min(known, key=lambda eps: abs(x / math.sqrt(x * x + eps) - seen))


_DEFAULT_EPS = {dtype: _default_eps(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def _in_graph(
    function: type[_NormFunction],
    tensors: tuple[Any, ...],
    form: BackwardForm,
    saved: Saved,
    saver: Saver,
    by_channel: tuple[int, ...] | None = None,
) -> Tensor:
    """``function`` of (input, weight, bias, output, 1 / deviation), with its output published.

    ``by_channel``: the weight's shape that broadcasts to the input, where it does not by itself.
    """
    output = apply(function, *tensors, form, anchor(tensors[0]), saved.recipe, *saved.tensors)
    # Copies: a sharded layer's own are there for its own backward pass only, and an optimizer may change them.
    affine = [None if tensor is None else tensor.detach().clone() for tensor in tensors[1:3]]
    if by_channel is not None:
        affine = [None if tensor is None else tensor.view(by_channel) for tensor in affine]
    return saver.publish(output, saved.affine(*affine))


def _save_normalized(
    x: Tensor, mean: Tensor | None, rstd: Tensor, shape: Sequence[int], inner: int, saver: Saver
) -> Saved:
    """Return what to save of x-hat = (x - mean) / deviation, in the dtype of ``x``.

    ``shape``: of the statistics, which may be in a wider dtype, to broadcast to ``x``.

    ``inner``: of how many elements in a row each is, in memory; 0 where they are not in a row.
    """
    if inner and saver.policy.narrows(x):
        return Saved.of(saver.quantize(x, "normalized", Statistics(mean, rstd, inner)), "x-hat")
    centered = x if mean is None else x - mean.view(shape)
    normalized = centered * rstd.view(shape)
    if not saver.policy.narrows(x):
        return Saved.of(saver.quantize(normalized.to(x.dtype), "normalized"), "x-hat")
    packed = saver.quantize(normalized, "normalized")
    return Saved.of(packed._replace(layout=packed.layout._replace(dtype=x.dtype)), "x-hat")


def _in_a_row(x: Tensor, dim: int) -> int:
    """How many elements that follow each other in memory have the same place in ``dim``; 0 where ``x`` has gaps."""
    if not is_dense_in_memory(x):
        return 0
    order = memory_order(x)
    count = 1
    for inner in order[order.index(dim) + 1 :]:  # a compiler does not follow math.prod of these
        count *= x.shape[inner]
    return count


def _samplewise(x: Tensor, statistic: Tensor) -> int:
    """How many elements each is of, sample by sample; 0 where they do not follow each other in memory."""
    return x.numel() // max(statistic.numel(), 1) if x.is_contiguous() else 0


# Operators that autocast on a GPU computes in float32, which of rms_norm is so from PyTorch 2.12 on.
_FLOAT_IN_AUTOCAST = frozenset(
    name
    for name in ("layer_norm", "group_norm", "rms_norm")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
)


def _in_float(
    operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In the dtype in which autocast on a GPU has ``operator`` computed; on the CPU it leaves them alone."""
    in_autocast = x.is_cuda and torch.is_autocast_enabled("cuda") and operator in _FLOAT_IN_AUTOCAST
    if in_autocast and x.dtype is not torch.float64:
        return x.float(), *(None if tensor is None else tensor.float() for tensor in (weight, bias))  # type: ignore[return-value]
    return x, weight, bias


def _fits(input: Tensor, shape: Sequence[int], *affine: Tensor | None) -> bool:
    """Whether ``input`` ends in the shape that is normalized over, which the others have."""
    ends_in = tuple(input.shape[-len(shape) :]) == tuple(shape)
    return ends_in and input.numel() > 0 and _is_shaped(shape, *affine)


@stands_in_for("layer_norm")
def _layer_norm(
    call: Call, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if not wants_gradient(input, weight, bias) or not _fits(input, normalized_shape, weight, bias):
        return NotImplemented
    return dropit_layer_norm(input, normalized_shape, weight, bias, eps, saver=call.saver)


@stands_in_for("rms_norm")
def _rms_norm(call: Call, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    fits = wants_gradient(input, weight) and _fits(input, normalized_shape, weight)
    if not fits or input.dtype not in _DEFAULT_EPS:
        return NotImplemented
    return dropit_rms_norm(input, normalized_shape, weight, eps, saver=call.saver)


@stands_in_for("group_norm")
def _group_norm(
    call: Call, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if not wants_gradient(input, weight, bias) or input.dim() < 2 or input.numel() == 0:
        return NotImplemented
    if input.shape[1] % num_groups or not _is_shaped(input.shape[1:2], weight, bias):
        return NotImplemented
    return dropit_group_norm(input, num_groups, weight, bias, eps, saver=call.saver)


@stands_in_for("batch_norm", unquantized=True)
def _batch_norm(
    call: Call,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *others: Any,
) -> Any:
    if others or not training or not wants_gradient(input, weight, bias) or not has_batches(input):
        return NotImplemented
    if is_of_parameter(input):
        return _standardized(call, input, running_mean, running_var, weight, bias, momentum, eps)
    if call.saver.bits is None:
        return NotImplemented
    return dropit_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, saver=call.saver)


def _standardized(call: Call, weight: Tensor, *arguments: Any) -> Any:
    """A convolution's weight, standardized as by a BatchNorm: whoever reads it computes it again in backward."""
    mean, var, scale, bias, momentum, eps = arguments
    if mean is not None or var is not None or bias is not None:
        return NotImplemented
    output = F.batch_norm(weight, mean, var, scale, bias, True, momentum, eps)
    again = partial(_standardize, eps)
    scales = () if scale is None else (scale.detach(),)
    saved = Saved.of(keep_dense(weight), "weight").map("standardized", again, *scales)
    return call.saver.memo.publish(output, Published(saved, _WHOLE))


_WHOLE = 64  # bits: of what comes back exactly


def _standardize(eps: float, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return F.batch_norm(weight, None, None, scale, None, True, 0.0, eps)


def _is_shaped(shape: Sequence[int], *tensors: Tensor | None) -> bool:
    return all(tensor is None or tuple(tensor.shape) == tuple(shape) for tensor in tensors)
