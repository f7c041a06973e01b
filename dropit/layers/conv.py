"""Convolutions and transposed convolutions, in one to three dimensions, whose input is packed for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dropit.layers.layer import PackedInputLayer, autocast, first_order_only
from dropit.layers.table import register
from dropit.packer import Packer


class Geometry(NamedTuple):
    """Where a convolution's windows lie, in the order of ``torch.convolution``; the padding is with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class DropITConvFunction(Function):
    """y = conv(x, W) + b. grad_input and grad_bias are exact; grad_weight is that of what x is restored to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        restore: Callable[..., Tensor] | None,
        *stored: Tensor | None,
    ) -> Tensor:
        """The plain forward; ``restore(*stored)`` gives the input back, if grad_weight is wanted."""
        return torch.convolution(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the weight and what is stored of the input."""
        input, weight, _, ctx.geometry, ctx.restore, *stored = inputs
        ctx.input_shape = input.shape
        ctx.save_for_backward(weight, *stored)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, out, *spatial). Returns grads of input (N, in, *spatial), weight and bias."""
        weight, *stored = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        shape_only = grad_output.new_zeros(()).expand(ctx.input_shape)  # all that grad_input asks of the input
        input = ctx.restore(*stored) if wanted[1] else shape_only
        bias_shape = [grad_output.shape[1]]
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_output, input, weight, bias_shape, *ctx.geometry, wanted
        )
        if grad_weight is not None:
            grad_weight = first_order_only(grad_weight, weight)
        return grad_input, grad_weight, grad_bias, None, None, *[None] * len(stored)


def dropit_conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, packer: Packer) -> Tensor:
    """``torch.convolution`` that keeps for backward only what ``packer`` stores of ``input`` ([N,] in, *spatial).

    With a frozen weight it keeps nothing of the input, where PyTorch keeps it whole.
    """
    if input.dim() < weight.dim():
        return dropit_conv(input.unsqueeze(0), weight, bias, geometry, packer).squeeze(0)
    x, w, b = autocast(input, weight, bias)
    if not weight.requires_grad:
        return DropITConvFunction.apply(x, w, b, geometry, None)  # type: ignore[no-any-return]
    stored = packer.store(x, input, channel_dim=1)
    if stored is None:
        return torch.convolution(input, weight, bias, *geometry)
    return DropITConvFunction.apply(x, w, b, geometry, *stored.arguments)  # type: ignore[no-any-return]


class _DropITConv(PackedInputLayer, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """input: (N, in_channels, *spatial) or (in_channels, *spatial)."""
        # Which may be replaced on the module, to pad in another way.
        if not self.saves(input=input) or "_conv_forward" in self.__dict__:
            return super().forward(input)  # type: ignore[misc, no-any-return]
        padded, padding = self._pad(input)
        none = (0,) * len(self.stride)
        geometry = Geometry(self.stride, padding, self.dilation, False, none, self.groups)
        return dropit_conv(padded, self.weight, self.bias, geometry, self._dropit_packer)

    def _pad(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Pad first where the convolution cannot: with other than zeros, or by one more on one side ('same')."""
        around = self._reversed_padding_repeated_twice  # (left, right, top, bottom, ...)
        none = (0,) * len(self.stride)
        if self.padding_mode != "zeros":
            return F.pad(input, around, mode=self.padding_mode), none
        before, after = around[::2], around[1::2]
        if before == after:
            return input, tuple(reversed(before))
        return F.pad(input, around), none


class _DropITConvTranspose(PackedInputLayer, nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """input: (N, in_channels, *spatial) or (in_channels, *spatial)."""
        if not self.saves(input=input):
            return super().forward(input, output_size)  # type: ignore[misc, no-any-return]
        dimensions = len(self.stride)
        extra = self._output_padding(
            input,
            output_size,
            list(self.stride),
            list(self.padding),  # type: ignore[arg-type]
            list(self.kernel_size),
            dimensions,
            list(self.dilation),
        )
        geometry = Geometry(self.stride, self.padding, self.dilation, True, tuple(extra), self.groups)  # type: ignore[arg-type]
        return dropit_conv(input, self.weight, self.bias, geometry, self._dropit_packer)


@register
class DropITConv1d(_DropITConv, nn.Conv1d):
    """nn.Conv1d with a packed input."""

    plain = nn.Conv1d


@register
class DropITConv2d(_DropITConv, nn.Conv2d):
    """nn.Conv2d with a packed input."""

    plain = nn.Conv2d


@register
class DropITConv3d(_DropITConv, nn.Conv3d):
    """nn.Conv3d with a packed input."""

    plain = nn.Conv3d


@register
class DropITConvTranspose1d(_DropITConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with a packed input."""

    plain = nn.ConvTranspose1d


@register
class DropITConvTranspose2d(_DropITConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a packed input."""

    plain = nn.ConvTranspose2d


@register
class DropITConvTranspose3d(_DropITConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with a packed input."""

    plain = nn.ConvTranspose3d
