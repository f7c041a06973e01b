"""Activations that are linear in pieces: one bit per element says which piece, and the gradients are exact."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.function import (
    LayerFunction,
    apply,
    in_place,
    link_to,
    none_for_none,
    undefined_gradients_as_none,
    with_zeros,
)
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.masks import apply_saved_mask, save_mask, save_range_mask, saved_mask
from dropit.layers.table import register
from dropit.rematerialize import Memo

_aten = torch.ops.aten


class DropITReLUFunction(LayerFunction):
    """y = x between ``lower`` and ``upper``; outside, a constant, or slope * x. Saves a bit per element, not y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor, lower: float, upper: float, slope: float, inplace: bool, link: tuple[Tensor] | None
    ) -> Tensor:
        """The plain forward."""
        if slope:
            output = F.leaky_relu(input, slope, inplace)
        elif upper == math.inf:
            output = F.relu(input, inplace)
        else:
            output = F.hardtanh(input, lower, upper, inplace)
        return input if inplace else output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save where the gradient passes. The output tells as well as the input: y <= lower where x is."""
        undefined_gradients_as_none(ctx)
        input, lower, ctx.upper, ctx.slope, inplace, ctx.link = inputs
        if inplace:
            ctx.mark_dirty(input)
        # The gradient of NaN passes, as PyTorch has it but for hardtanh, where it depends on the place in the tensor,
        # and for a leaky ReLU.
        if ctx.slope:
            save_mask(ctx, output > 0)
        elif _represents(output.dtype, lower) and _represents(output.dtype, ctx.upper):
            save_range_mask(ctx, output, lower, ctx.upper)
        else:  # PyTorch compares the input with other bounds than it clamps to: by its operator
            passes = _aten.hardtanh_backward(torch.ones_like(output), input.detach(), lower, ctx.upper)
            save_mask(ctx, passes != 0)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output where it passes, slope * grad_output elsewhere."""
        if ctx.slope:
            grad_input = torch.where(saved_mask(ctx), grad_output, grad_output * ctx.slope)
        else:
            grad_input = apply_saved_mask(
                ctx, grad_output, _relu_backward if ctx.upper == math.inf else _hardtanh_backward
            )
        return with_zeros(grad_input, ctx.link), None, None, None, None, None


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]


def _hardtanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.hardtanh_backward(grad, x, 0, math.inf)  # type: ignore[no-any-return]


def _represents(dtype: torch.dtype, bound: float) -> bool:
    """Whether the bound is a number of the dtype."""
    digits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype)
    if digits is None or bound == 0 or math.isinf(bound):
        return True
    limits = torch.finfo(dtype)
    mantissa, _ = math.frexp(bound)
    return limits.tiny <= abs(bound) <= limits.max and (mantissa * 2**digits).is_integer()


def dropit_relu(
    input: Tensor, memo: Memo, inplace: bool = False, *, lower: float = 0.0, upper: float = math.inf, slope: float = 0.0
) -> Tensor:
    """Compute ``F.relu``, ``F.hardtanh`` or, with a slope, ``F.leaky_relu``, and save a bit per element."""
    published = memo.published(input)
    output = in_place(
        inplace, input, lambda x, inplace: apply(DropITReLUFunction, x, lower, upper, slope, inplace, link_to(x))
    )
    if published is None:
        return output
    if slope:
        leaky, in_place_leaky = (partial(F.leaky_relu, negative_slope=slope, inplace=each) for each in (False, True))
        return memo.publish(output, published.map("relu", leaky, in_place=in_place_leaky))
    return memo.publish(output, published.clamp("relu", lower, upper))


@register
class DropITReLU(DropITLayer, nn.ReLU):
    """nn.ReLU that saves a bit per element."""

    plain = nn.ReLU

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape."""
        if not self.saves(input):
            return self.pass_on_unsaved(super().forward, input)
        return dropit_relu(input, self._dropit_memo, self.inplace)


@register
class DropITHardtanh(DropITLayer, nn.Hardtanh):
    """nn.Hardtanh that saves a bit per element."""

    plain = nn.Hardtanh

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape."""
        exact = _represents(input.dtype, self.min_val) and _represents(input.dtype, self.max_val)
        hidden = self.inplace and not exact  # the output does not tell what the input would
        if not self.saves(input) or hidden or self.max_val == math.inf:
            return self.pass_on_unsaved(super().forward, input)
        return dropit_relu(input, self._dropit_memo, self.inplace, lower=self.min_val, upper=self.max_val)


@register
class DropITReLU6(DropITHardtanh, nn.ReLU6):
    """nn.ReLU6, a Hardtanh from 0 to 6, that saves a bit per element."""

    plain = nn.ReLU6  # type: ignore[assignment]


@register
class DropITLeakyReLU(DropITLayer, nn.LeakyReLU):
    """nn.LeakyReLU that saves a bit per element, if its slope is above zero: then the output has the input's sign."""

    plain = nn.LeakyReLU

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape."""
        if not self.saves(input) or self.negative_slope <= 0:
            return self.pass_on_unsaved(super().forward, input)
        return dropit_relu(input, self._dropit_memo, self.inplace, slope=self.negative_slope)


@stands_in_for("relu", unquantized=True)
def _relu(call: Call, input: Any, inplace: bool = False) -> Any:
    return dropit_relu(input, call.saver.memo, inplace) if wants_gradient(input) else NotImplemented


@stands_in_for("relu_", unquantized=True)
def _relu_in_place(call: Call, input: Any) -> Any:
    return _relu(call, input, inplace=True)


@stands_in_for("relu6", unquantized=True)
def _relu6(call: Call, input: Any, inplace: bool = False) -> Any:
    return dropit_relu(input, call.saver.memo, inplace, upper=6.0) if wants_gradient(input) else NotImplemented


@stands_in_for("leaky_relu", unquantized=True)
def _leaky_relu(call: Call, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not wants_gradient(input) or negative_slope <= 0:
        return NotImplemented
    return dropit_relu(input, call.saver.memo, inplace, slope=negative_slope)
