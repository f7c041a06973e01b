"""nn.Conv2d whose input is packed for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dropit import ops
from dropit.layers.layer import DropITLayer, autocast, save_for_backward, saved_tensors
from dropit.strategies import Strategy


class Geometry(NamedTuple):
    """Where a convolution's windows lie; the padding is with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class DropITConv2dFunction(Function):
    """y = conv(x, W) + b. grad_input and grad_bias are exact; grad_weight is that of the packed x (DropIT, eq. 5)."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, strategy: Strategy
    ) -> Tensor:
        """The plain forward."""
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the weight, and the packed input if grad_weight is wanted."""
        input, weight, _, geometry, strategy = inputs
        packed = strategy.pack(input) if ctx.needs_input_grad[1] else None
        ctx.geometry, ctx.input_shape = geometry, input.shape
        save_for_backward(ctx, packed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, out, H, W). Returns grads of input (N, in, H, W), weight and bias."""
        packed, weight = saved_tensors(ctx)
        stride, padding, dilation, groups = ctx.geometry
        wanted = ctx.needs_input_grad[:3]
        shape_only = grad_output.new_zeros(()).expand(ctx.input_shape)  # all that grad_input asks of the input
        input = ops.unpack(packed) if wanted[1] else shape_only
        grads = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,  # not transposed
            [0] * len(stride),
            groups,
            wanted,
        )
        return *grads, None, None


def dropit_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, strategy: Strategy) -> Tensor:
    """``F.conv2d`` that keeps for backward only what ``strategy`` keeps of ``input`` (N, C, H, W) or (C, H, W)."""
    input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    if input.dim() == 3:
        output = DropITConv2dFunction.apply(input.unsqueeze(0), weight, bias, geometry, strategy)
        return output.squeeze(0)  # type: ignore[no-any-return]
    return DropITConv2dFunction.apply(input, weight, bias, geometry, strategy)  # type: ignore[no-any-return]


class DropITConv2d(DropITLayer, nn.Conv2d):
    """nn.Conv2d with a packed input."""

    plain = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, in_channels, H, W) or (in_channels, H, W)."""
        if not self.drops():
            return super().forward(input)
        padded, padding = self._pad(input)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        return dropit_conv2d(padded, self.weight, self.bias, geometry, self.strategy)

    def _pad(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What the Function cannot do: padding with other than zeros, or by one more on one side ('same')."""
        around = self._reversed_padding_repeated_twice  # (left, right, top, bottom)
        if self.padding_mode != "zeros":
            return F.pad(input, around, mode=self.padding_mode), (0, 0)
        before, after = around[::2], around[1::2]
        if before == after:
            return input, tuple(reversed(before))
        return F.pad(input, around), (0, 0)
