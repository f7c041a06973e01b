"""nn.Linear whose input is packed, quantized or rematerialized for the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.formats import as_non_view, autocast
from dropit.layers.function import (
    LayerFunction,
    anchor,
    apply,
    first_order_only,
    none_for_none,
    undefined_gradients_as_none,
    wanted_gradients,
)
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import register
from dropit.saved import Recipe
from dropit.saver import Saver
from dropit.tracing import is_mapped


class DropITLinearFunction(LayerFunction):
    """y = x W^T + b. grad_input and grad_bias are exact; grad_weight is computed from x as it is restored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        recipe: Recipe,
        *saved: Tensor | None,
    ) -> Tensor:
        """Compute the plain forward; ``recipe.restore(*saved)`` gives the input back."""
        return as_non_view(F.linear(input, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the input, and the weight if grad_input is wanted."""
        undefined_gradients_as_none(ctx)
        _, weight, _, anchor, ctx.recipe, *saved = inputs
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns grad_input (..., in), grad_weight (out, in), grad_bias (out,)."""
        weight, anchor, *saved = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = wanted_gradients(ctx, 3)
        grad_input = grad_weight = grad_bias = None
        rows = as_rows(grad_output)  # (samples, out)
        if needs_input:
            grad_input = grad_output @ weight
        if needs_weight:
            grad_weight = _grad_weight(rows, ctx.recipe, *saved)
            # Of a tensor that autograd sees, so that it notices who differentiates the weight's gradient.
            through = grad_output if weight is None else weight
            grad_weight = first_order_only(grad_weight, through if anchor is None else anchor)
        if needs_bias:
            grad_bias = rows.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, *[None] * len(saved)


def _grad_weight(rows: Tensor, recipe: Recipe, *saved: Tensor | None) -> Tensor:
    """rows: (samples, out). Returns (out, in): nothing is computed of channels that were dropped whole, but zeros."""
    if recipe.channels is None:
        return rows.t() @ as_rows(recipe.restore(*saved))
    kept, channels = recipe.restore_channels(*saved)
    grad = rows.t() @ as_rows(kept)  # (out, k)
    return grad.new_zeros(grad.shape[0], recipe.channels.shape[-1]).index_copy_(1, channels, grad)


def as_rows(x: Tensor) -> Tensor:
    """(..., n) -> (samples, n), of which either may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dropit_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saver: Saver,
    *,
    batch_dim: int = 0,
    role: str = "input",
    flat: bool = False,
) -> Tensor:
    """Compute ``F.linear``, and save for backward only what ``saver`` says of ``input`` (..., in).

    An input that is to be saved as it is, or that a frozen weight does not need, is left to PyTorch. ``role`` tells a
    layer's inputs apart.
    ``flat``: compute and return (samples, out), which sums in another order.
    """
    plain_input = as_rows(input) if flat else input
    if not weight.requires_grad or not input.is_floating_point() or is_mapped(weight):
        return F.linear(plain_input, weight, bias)
    x, w, b = autocast(input, weight, bias)
    # What restores x, or None to save it as it is. What was published is found by ``input``, which autocast may copy.
    saved = saver.save(x, input, batch_dim=batch_dim, role=role)
    if saved is None:
        return F.linear(plain_input, weight, bias)  # which casts by itself under autocast
    x = as_rows(x) if flat else x
    return apply(DropITLinearFunction, x, w, b, anchor(x), saved.recipe, *saved.tensors)  # type: ignore[no-any-return]


@register
class DropITLinear(DropITLayer, nn.Linear):
    """nn.Linear whose input is packed, quantized or rematerialized."""

    plain = nn.Linear
    drops_input = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features). Returns (..., out_features)."""
        if not self.dropit_is_active(input=input):
            return super().forward(input)
        # Each is read once: a parametrization computes it at each reading, and may change state (spectral norm).
        return dropit_linear(input, self.weight, self.bias, self._dropit_saver)


@stands_in_for("linear", unquantized=True)
def _linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Any:
    if not wants_gradient(input, weight, bias) or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    return dropit_linear(input, weight, bias, call.saver, role=call.role("input"))
