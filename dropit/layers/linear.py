"""nn.Linear whose input is packed for the backward pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dropit import ops
from dropit.layers.layer import PackedInputLayer, autocast, save_for_backward, saved_tensors
from dropit.strategies import Strategy


class DropITLinearFunction(Function):
    """y = x W^T + b. grad_input and grad_bias are exact; grad_weight is that of the packed x."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, strategy: Strategy) -> Tensor:  # type: ignore[override]
        """The plain forward."""
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the packed input if grad_weight is wanted, the weight if grad_input is."""
        input, weight, _, strategy = inputs
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        packed = strategy.pack(input) if needs_weight else None
        save_for_backward(ctx, packed, weight if needs_input else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns grad_input (..., in), grad_weight (out, in), grad_bias (out,)."""
        packed, weight = saved_tensors(ctx)
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (samples, out)
        if needs_input:
            grad_input = grad_output @ weight
        if needs_weight:
            input = ops.unpack(packed)
            grad_weight = rows.t() @ input.reshape(-1, input.shape[-1])
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None


def dropit_linear(input: Tensor, weight: Tensor, bias: Tensor | None, strategy: Strategy) -> Tensor:
    """``F.linear`` that keeps for backward only what ``strategy`` keeps of ``input`` (..., in)."""
    return DropITLinearFunction.apply(*autocast(input, weight, bias), strategy)  # type: ignore[no-any-return]


class DropITLinear(PackedInputLayer, nn.Linear):
    """nn.Linear with a packed input."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        if self.packs(self.weight):
            return dropit_linear(input, self.weight, self.bias, self.strategy)
        return super().forward(input)
