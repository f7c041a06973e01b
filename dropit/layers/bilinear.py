"""F.bilinear, and with it nn.Bilinear, whose two inputs are saved in few bits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

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
from dropit.layers.linear import as_rows
from dropit.saved import Recipe


class DropITBilinearFunction(LayerFunction):
    """y_o = a^T W_o b + c_o. The gradients of a, b and W are computed from a and b as they are restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        recipes: tuple[Recipe, Recipe],
        count: int,
        *saved: Tensor | None,
    ) -> Tensor:
        """Compute the plain forward; the first ``count`` of ``saved`` restore a, the others b."""
        return F.bilinear(a, b, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the weight, and what restores the inputs."""
        undefined_gradients_as_none(ctx)
        _, _, weight, _, anchor, ctx.recipes, ctx.count, *saved = inputs
        ctx.save_for_backward(weight, anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (..., out). Returns those of a (..., in1), b (..., in2), W (out, in1, in2) and c (out,)."""
        weight, anchor, *saved = ctx.saved_tensors
        a, b = ctx.recipes[0].restore(*saved[: ctx.count]), ctx.recipes[1].restore(*saved[ctx.count :])
        of_a, of_b, of_weight, of_bias = wanted_gradients(ctx, 4)
        grads: list[Tensor | None] = [None] * 3
        if of_a:
            grads[0] = F.bilinear(grad_output, b, weight.permute(1, 0, 2))
        if of_b:
            grads[1] = F.bilinear(grad_output, a, weight.permute(2, 0, 1))
        rows = as_rows(grad_output)
        if of_weight:
            outer = rows.unsqueeze(2) * as_rows(a).unsqueeze(1)  # (samples, out, in1)
            grads[2] = (outer.flatten(1).t() @ as_rows(b)).view_as(weight)
        through = grad_output if anchor is None else anchor
        once = [None if grad is None else first_order_only(grad, through) for grad in grads]
        return *once, rows.sum(dim=0) if of_bias else None, *[None] * (len(saved) + 3)


@stands_in_for("bilinear")
def _bilinear(call: Call, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    if not wants_gradient(input1, input2, weight, bias) or weight.dim() != 3:
        return NotImplemented
    fits = input1.shape[:-1] == input2.shape[:-1] and weight.shape[1:] == (input1.shape[-1], input2.shape[-1])
    if not fits or input1.numel() == 0 or input2.numel() == 0:
        return NotImplemented
    a, b = (call.saver.save_whole(x, call.role(name)) for x, name in ((input1, "a"), (input2, "b")))
    recipes = a.recipe, b.recipe
    return apply(
        DropITBilinearFunction,
        input1,
        input2,
        weight,
        bias,
        anchor(input1, input2),
        recipes,
        len(a.tensors),
        *a.tensors,
        *b.tensors,
    )
