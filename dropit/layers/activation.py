"""Smooth activations: the input is saved in few bits, or not at all where a normalization rematerializes it.

The derivative alone could be saved with less error (a known range, no scales: on normal inputs GELU's gradient is off
by 0.2 % with 8 bits and 3.9 % with 4, from a quantized input by 0.5 % and 8.4 %). But from the input the output can be
computed as well, which the next layer reads: to save the output too, with nine in ten of its elements dropped, would
take half as much again.

Where an activation saturates, what is saved is bounded, so that a huge element, or an infinite one, costs the others of
its group no precision. Sigmoid and tanh save their output, as PyTorch does. The others vanish to the left: their input
is bounded from below, where that changes output and derivative by less than rounding to so many bits does. To the right
they are the identity, and an element is off by what :func:`dropit.ops.reference.quantize` says: by half of what a code
stands for, relative to the largest finite magnitude of its group of 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit import ops
from dropit.layers.function import (
    LayerFunction,
    anchor,
    apply,
    first_order_only,
    in_place,
    none_for_none,
    undefined_gradients_as_none,
)
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import swap_class
from dropit.packed import Layout, flatten, unflatten
from dropit.saved import Recipe, Saved
from dropit.saver import Saver
from dropit.tracing import is_traced

_aten = torch.ops.aten


class Curve(NamedTuple):
    """An activation: y = function(x, inplace), and the gradient of x from that of y, at x.

    ``floor``: by bits, what x is bounded by before it is rounded, where f vanishes to the left. From there on f' is
    less than 1 / (2 steps), which is 0.071 in 4 bits, 0.0039 in 8, 1.5e-5 in 16, and f less than half a step of a group
    that has such an element: no more than rounding changes them elsewhere. 2 bits have that of 4.

    ``center``: where f is bounded from both sides, the middle of its range. y is saved then, relative to it, and
    ``backward`` takes y in the place of x.

    ``jump``: where f' jumps, at plus and minus that, to what it is there, too. In 16 bits a bit more for each element
    says on which side of it x was; in fewer, the error of the few elements that rounding leads across is small beside
    that of all.
    """

    function: Callable[[Tensor, bool], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    floor: dict[int, float] | None = None
    center: float | None = None
    jump: float | None = None


_GELU_FLOOR = {2: -2.2, 4: -2.2, 8: -3.5, 16: -5.0}  # f' is -0.064, -0.0028, -7.1e-6
_SILU_FLOOR = {2: -3.6, 4: -3.6, 8: -7.5, 16: -14.0}  # f' is -0.067, -0.0036, -1.1e-5
# Of the sigmoid, which is 2e-9 there, where it is a factor or softplus' derivative: all of a tensor may be far left, as
# the logarithms of a Mamba's steps are, so that only what is huge or infinite is bounded.
SIGMOID_FLOOR = dict.fromkeys((2, 4, 8, 16), -20.0)
# Before PyTorch 2.8 the derivative at the jump itself is that of between.
_JUMPS_BEHIND = bool(_aten.hardswish_backward(torch.ones(1, device="cpu"), torch.full((1,), 3.0, device="cpu")) > 1)
# f' jumps from 0 to -1/2 at -3, which rounding must not cross: half a step is less than 1 as long as all magnitudes of
# the group are below 2 steps, 14 in 4 bits. The levels of 2 bits follow the group, and may cross it.
_HARDSWISH_FLOOR = dict.fromkeys((2, 4, 8, 16), -4.0)


def _new_gelu(x: Tensor, inplace: bool) -> Tensor:
    """GELU by tanh, with the operations of transformers' NewGELUActivation in their order."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _bloom_gelu(x: Tensor, inplace: bool) -> Tensor:
    """GELU by tanh, with the operations of transformers' BloomGelu in their order."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


def _softplus_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.softplus_backward(grad, x, 1.0, 20.0)  # type: ignore[no-any-return]


CURVES: dict[str, Curve] = {
    "gelu": Curve(lambda x, _: F.gelu(x), _aten.gelu_backward, _GELU_FLOOR),
    "gelu_tanh": Curve(lambda x, _: F.gelu(x, approximate="tanh"), _gelu_tanh_backward, _GELU_FLOOR),
    "new_gelu": Curve(_new_gelu, _gelu_tanh_backward, _GELU_FLOOR),
    "bloom_gelu": Curve(_bloom_gelu, _gelu_tanh_backward, _GELU_FLOOR),
    "silu": Curve(lambda x, inplace: F.silu(x, inplace), _aten.silu_backward, _SILU_FLOOR),
    "quick_gelu": Curve(
        lambda x, _: x * torch.sigmoid(1.702 * x),
        lambda grad, x: _aten.silu_backward(grad, 1.702 * x),
        {bits: floor / 1.702 for bits, floor in _SILU_FLOOR.items()},
    ),
    "mish": Curve(lambda x, inplace: F.mish(x, inplace), _aten.mish_backward, _SILU_FLOOR),
    "hardswish": Curve(
        lambda x, inplace: F.hardswish(x, inplace), _aten.hardswish_backward, _HARDSWISH_FLOOR, jump=3.0
    ),
    "softplus": Curve(lambda x, _: F.softplus(x), _softplus_backward, SIGMOID_FLOOR),
    "sigmoid": Curve(lambda x, _: torch.sigmoid(x), _aten.sigmoid_backward, center=0.5),
    "tanh": Curve(lambda x, _: torch.tanh(x), _aten.tanh_backward, center=0.0),
}


class DropITActivationFunction(LayerFunction):
    """y = f(x). The gradient is computed from x, or from y where the curve's is a function of y, as it is restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        output: Tensor | None,
        name: str,
        inplace: bool,
        anchor: Tensor | None,
        recipe: Recipe,
        *saved: Tensor | None,
    ) -> Tensor:
        """The plain forward, or ``output`` where it has been computed."""
        if output is not None:
            return output
        output = CURVES[name].function(input, inplace)
        return input if inplace else output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the input or the output."""
        undefined_gradients_as_none(ctx)
        input, computed, ctx.curve, inplace, anchor, ctx.recipe, *saved = inputs
        if inplace or computed is not None:
            ctx.mark_dirty(input if inplace else computed)
        ctx.save_for_backward(anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output * f'(x)."""
        anchor, *saved = ctx.saved_tensors  # which a checkpoint lets be read once
        grad_input = CURVES[ctx.curve].backward(grad_output, ctx.recipe.restore(*saved))
        return first_order_only(grad_input, anchor), None, None, None, None, None, *[None] * len(saved)


class DropITActivation(DropITLayer):
    """Base of the activations. ``curve`` names the one it computes, in CURVES; None computes it as PyTorch does."""

    quantizes = True
    curve: str | None
    inplace = False

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape."""
        if self.curve is None or not input.is_floating_point():
            return super().forward(input)  # type: ignore[no-any-return, misc]
        if not self.saves(input) or (not self._dropit_memo.callers and _is_part(input)):
            return self.publish_unsaved(super().forward(input))  # type: ignore[misc]
        return dropit_activation(input, self.curve, self._dropit_saver, inplace=self.inplace)


def _is_part(input: Tensor) -> bool:
    """Whether ``input`` is a part of a larger tensor, as in a gated MLP, whose other part keeps both in memory.

    It does not where the calls of the gated MLP's own code are taken.
    """
    return not is_traced() and input.untyped_storage().nbytes() > input.nbytes


def dropit_activation(input: Tensor, name: str, saver: Saver, *, inplace: bool = False) -> Tensor:
    """Compute the activation called ``name`` in CURVES, and save its input or output in ``saver.bits`` bits."""
    curve, published = CURVES[name], saver.memo.published(input)
    rematerialized = published is not None and published.saved is not None
    if curve.center is not None:
        return _bounded_activation(input, name, saver, rematerialized)
    overwritten = inplace and not saver.policy.narrows(input)  # which would be saved as it is
    if rematerialized or overwritten:
        saved = saver.save_whole(input.clone() if overwritten else input)
    else:
        saved = _save_input(input, curve, saver)
    if curve.jump is not None and saver.bits == 16 and (rematerialized or saver.policy.narrows(input)):
        saved = _with_sides(input, saved, curve.jump)
    rest = anchor(input), saved.recipe, *saved.tensors
    output = in_place(inplace, input, lambda x, inplace: apply(DropITActivationFunction, x, None, name, inplace, *rest))
    return saver.publish(output, saved.map(name, partial(_again, name)))


def _bounded_activation(input: Tensor, name: str, saver: Saver, rematerialized: bool) -> Tensor:
    """Compute one whose derivative is a function of the output.

    ``rematerialized``: whether the input comes from what another layer saves.
    """
    curve = CURVES[name]
    assert curve.center is not None
    if not rematerialized and not saver.policy.narrows(input):  # PyTorch saves the output, and no more
        output = curve.function(input, False)
        return saver.publish(output, Saved.of(saver.quantize(output), "output"))
    output = curve.function(input.detach(), False)
    if rematerialized:
        saved = saver.save_whole(input).map(name, partial(_again, name))
    else:
        # The derivative is the largest in the center, where the codes lie the same to both sides.
        saved = Saved.of(saver.quantize(output - curve.center if curve.center else output), "output")
        saved = saved.map("from center", partial(_from_center, curve.center))
    output = apply(DropITActivationFunction, input, output, name, False, anchor(input), saved.recipe, *saved.tensors)
    return saver.publish(output, saved)


def _save_input(x: Tensor, curve: Curve, saver: Saver) -> Saved:
    """Return what to save of ``x``: as it is where it is not narrowed, else bounded where that makes no difference."""
    if curve.floor is None or saver.bits is None or not saver.policy.narrows(x):
        return saver.save_whole(x)
    return Saved.of(saver.quantize(x.detach().clamp(min=curve.floor[saver.bits])))


def _with_sides(x: Tensor, saved: Saved, jump: float) -> Saved:
    """Return ``saved``, of ``x``, with a bit for each element: whether it lies between minus and plus ``jump``."""
    flat, layout = flatten(x.detach())
    apart = jump * torch.finfo(x.dtype).eps
    below, above = (jump, jump + apart) if _JUMPS_BEHIND else (jump - apart, jump)
    return saved.map("side", partial(_on_its_side, below, above, layout), ops.range_bitmask(flat, -above, above))


def _on_its_side(below: float, above: float, layout: Layout, x: Tensor, bits: Tensor) -> Tensor:
    """``x``, moved to ``below`` where it crossed the jump from inside, or to ``above`` where it did from outside."""
    inside = unflatten(ops.unpack_bits(bits, layout.numel), layout)
    outside = torch.where(x < 0, x.clamp(max=-above), x.clamp(min=above))
    return torch.where(inside, x.clamp(-below, below), outside)


def _from_center(center: float, distance: Tensor) -> Tensor:
    """The output at that distance; at the ends of its range, the rounding of the scale may have led beyond."""
    return (distance.add_(center) if center else distance).clamp_(2 * center - 1, 1)


def _again(name: str, x: Tensor) -> Tensor:
    return CURVES[name].function(x, False)


class _DropITGELU(DropITActivation):
    @property
    def curve(self) -> str:  # type: ignore[override]
        """By erf or by tanh."""
        return "gelu_tanh" if self.approximate == "tanh" else "gelu"


DropITGELU = swap_class(_DropITGELU, nn.GELU)
DropITSiLU = swap_class(DropITActivation, nn.SiLU, curve="silu")
DropITMish = swap_class(DropITActivation, nn.Mish, curve="mish")
DropITHardswish = swap_class(DropITActivation, nn.Hardswish, curve="hardswish")
DropITSigmoid = swap_class(DropITActivation, nn.Sigmoid, curve="sigmoid")
DropITTanh = swap_class(DropITActivation, nn.Tanh, curve="tanh")


@stands_in_for("gelu")
def _gelu(call: Call, input: Any, *, approximate: str = "none") -> Any:
    return _activate(call, input, "gelu" if approximate == "none" else "gelu_tanh")


@stands_in_for("softplus")
def _softplus(call: Call, input: Any, beta: float = 1, threshold: float = 20) -> Any:
    return _activate(call, input, "softplus") if (beta, threshold) == (1, 20) else NotImplemented


def _activate(call: Call, input: Any, name: str, inplace: bool = False) -> Any:
    if not wants_gradient(input) or input.numel() == 0:
        return NotImplemented
    return dropit_activation(input, name, call.saver, inplace=inplace)


def _enter(name: str) -> None:
    @stands_in_for(name)
    def called(call: Call, input: Any, inplace: bool = False) -> Any:
        return _activate(call, input, name, inplace)


for _name in ("silu", "mish", "hardswish", "sigmoid", "tanh"):
    _enter(_name)
