"""nn.Linear whose input is packed for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.layer import (
    LayerFunction,
    PackedInputLayer,
    anchor,
    as_non_view,
    autocast,
    first_order_only,
    none_for_none,
    without_zeros,
)
from dropit.layers.table import register
from dropit.packer import Packer
from dropit.tracing import is_mapped


class DropITLinearFunction(LayerFunction):
    """y = x W^T + b. grad_input and grad_bias are exact; grad_weight is that of what x is restored to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        restore: Callable[..., Tensor],
        *stored: Tensor | None,
    ) -> Tensor:
        """The plain forward; ``restore(*stored)`` gives the input back."""
        return as_non_view(F.linear(input, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what is stored of the input, and the weight if grad_input is wanted."""
        without_zeros(ctx)
        _, weight, _, anchor, ctx.restore, *stored = inputs
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, anchor, *stored)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns grad_input (..., in), grad_weight (out, in), grad_bias (out,)."""
        weight, anchor, *stored = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None
        rows = as_rows(grad_output)  # (samples, out)
        if needs_input:
            grad_input = grad_output @ weight
        if needs_weight:
            grad_weight = rows.t() @ as_rows(ctx.restore(*stored))
            through = grad_output if weight is None else weight
            grad_weight = first_order_only(grad_weight, through if anchor is None else anchor)
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, *[None] * len(stored)


def as_rows(x: Tensor) -> Tensor:
    """(..., n) -> (samples, n), of which either may be none."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dropit_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packer: Packer,
    *,
    batch_dim: int = 0,
    role: str = "input",
    flat: bool = False,
) -> Tensor:
    """``F.linear`` that keeps for backward only what ``packer`` stores of ``input`` (..., in).

    What is stored as it is, or not at all, is left to PyTorch. ``role`` tells a layer's inputs apart if it has several.
    ``flat``: compute and return (samples, out), which is another order of sums.
    """
    plain = as_rows(input) if flat else input
    if not weight.requires_grad or not input.is_floating_point() or is_mapped(weight):
        return F.linear(plain, weight, bias)
    x, w, b = autocast(input, weight, bias)
    stored = packer.store(x, input, batch_dim=batch_dim, role=role)
    if stored is None:
        return F.linear(plain, weight, bias)
    x = as_rows(x) if flat else x
    return DropITLinearFunction.apply(x, w, b, anchor(x), stored.restore, *stored.tensors)  # type: ignore[no-any-return]


@register
class DropITLinear(PackedInputLayer, nn.Linear):
    """nn.Linear with a packed input."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        if not self.saves(input=input):
            return super().forward(input)
        # Each is read once: a parametrization computes it, and may go on with each reading.
        return dropit_linear(input, self.weight, self.bias, self._dropit_packer)
