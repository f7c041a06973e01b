"""nn.Linear whose input is packed for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dropit.layers.layer import PackedInputLayer, autocast, first_order_only, no_view
from dropit.layers.table import register
from dropit.packer import Packer


class DropITLinearFunction(Function):
    """y = x W^T + b. grad_input and grad_bias are exact; grad_weight is that of what x is restored to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        restore: Callable[..., Tensor] | None,
        *stored: Tensor | None,
    ) -> Tensor:
        """The plain forward; ``restore(*stored)`` gives the input back, if grad_weight is wanted."""
        return no_view(F.linear(input, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what is stored of the input, and the weight if grad_input is wanted."""
        _, weight, _, ctx.restore, *stored = inputs
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *stored)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns grad_input (..., in), grad_weight (out, in), grad_bias (out,)."""
        weight, *stored = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (samples, out)
        if needs_input:
            grad_input = grad_output @ weight
        if needs_weight:
            input = ctx.restore(*stored)
            grad_weight = rows.t() @ input.reshape(-1, input.shape[-1])
            grad_weight = first_order_only(grad_weight, grad_output if weight is None else weight)
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, *[None] * len(stored)


def dropit_linear(input: Tensor, weight: Tensor, bias: Tensor | None, packer: Packer, *, batch_dim: int = 0) -> Tensor:
    """``F.linear`` that keeps for backward only what ``packer`` stores of ``input`` (..., in)."""
    x, w, b = autocast(input, weight, bias)
    if not weight.requires_grad:
        return DropITLinearFunction.apply(x, w, b, None)  # type: ignore[no-any-return]
    stored = packer.store(x, input, batch_dim=batch_dim)
    return DropITLinearFunction.apply(x, w, b, *stored.arguments)  # type: ignore[no-any-return]


@register
class DropITLinear(PackedInputLayer, nn.Linear):
    """nn.Linear with a packed input."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        if self.packs(self.weight):
            return dropit_linear(input, self.weight, self.bias, self.packer)
        return super().forward(input)
