"""nn.Linear whose input is packed for the backward pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dropit import ops
from dropit.layers.layer import PackedInputLayer, autocast, first_order_only
from dropit.layers.table import register
from dropit.packed import Layout, Packed
from dropit.packer import Packer


class DropITLinearFunction(Function):
    """y = x W^T + b. grad_input and grad_bias are exact; grad_weight is that of the packed x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
        positions: Tensor | None,
        scales: Tensor | None,
        layout: Layout | None,
    ) -> Tensor:
        """The plain forward; values, positions, scales and layout are the packed input, if grad_weight is wanted."""
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the packed input, and the weight if grad_input is wanted."""
        _, weight, _, values, positions, scales, ctx.layout = inputs
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, values, positions, scales)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns grad_input (..., in), grad_weight (out, in), grad_bias (out,)."""
        weight, values, positions, scales = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (samples, out)
        if needs_input:
            grad_input = grad_output @ weight
        if needs_weight:
            input = ops.unpack(Packed(values, positions, scales, ctx.layout))
            grad_weight = rows.t() @ input.reshape(-1, input.shape[-1])
            grad_weight = first_order_only(grad_weight, grad_output if weight is None else weight)
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def dropit_linear(input: Tensor, weight: Tensor, bias: Tensor | None, packer: Packer, *, batch_dim: int = 0) -> Tensor:
    """``F.linear`` that keeps for backward only what ``packer`` makes of ``input`` (..., in)."""
    x, w, b = autocast(input, weight, bias)
    packed = packer.pack(x, input, batch_dim=batch_dim) if weight.requires_grad else (None,) * 4
    return DropITLinearFunction.apply(x, w, b, *packed)  # type: ignore[no-any-return]


@register
class DropITLinear(PackedInputLayer, nn.Linear):
    """nn.Linear with a packed input."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        if self.packs(self.weight):
            return dropit_linear(input, self.weight, self.bias, self.packer)
        return super().forward(input)
