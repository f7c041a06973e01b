"""Products, quotients, powers and softmax in a module's own code: their operands are saved in few bits.

An operand is restored for its own derivative alone. What must be exact is saved as it is: denominators, parameters, and
operands that are small beside the result, as the deviation that a norm divides by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropit.layers.formats import autocast
from dropit.layers.function import LayerFunction, anchor, first_order_only, none_for_none, undefined_gradients_as_none
from dropit.layers.functions import Call, stands_in_for, tensors_of
from dropit.packed import keep_dense
from dropit.saved import Recipe, Saved

_SMALL = 256  # elements that are not worth a scale
_BROADCAST = 16  # times that an operand is repeated to be small beside the result


class Operation(NamedTuple):
    """y = function(a, b), and the gradients of a and b from that of y, before they are summed to their shapes.

    ``left``, ``right``: which operands the gradient of a takes, and that of b.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    grad_left: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    grad_right: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    left: tuple[bool, bool]
    right: tuple[bool, bool]


class DropITOperationFunction(LayerFunction):
    """y = function(a, b). The gradients are computed from a and b as they are restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        a: Tensor,
        b: Tensor,
        operation: Operation,
        anchor: Tensor | None,
        recipes: tuple[Recipe | None, Recipe | None],
        count: int,
        *saved: Tensor | None,
    ) -> Tensor:
        """The plain forward; the first ``count`` of ``saved`` restore a, the others b."""
        return operation.function(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the operands."""
        undefined_gradients_as_none(ctx)
        a, b, ctx.operation, anchor, ctx.recipes, ctx.count, *saved = inputs
        ctx.forms = (a.shape, a.dtype), (b.shape, b.dtype)
        ctx.save_for_backward(anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Each operand's gradient, in its shape and dtype."""
        anchor, *saved = ctx.saved_tensors
        parts = saved[: ctx.count], saved[ctx.count :]
        a, b = (recipe and recipe.restore(*part) for recipe, part in zip(ctx.recipes, parts, strict=True))
        functions = (ctx.operation.grad_left, ctx.operation.grad_right)
        grads = [
            first_order_only(function(grad_output, a, b).sum_to_size(shape).to(dtype), anchor) if wanted else None
            for function, wanted, (shape, dtype) in zip(functions, ctx.needs_input_grad[:2], ctx.forms, strict=True)
        ]
        return *grads, None, None, None, None, *[None] * len(saved)


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


MUL = Operation("mul", torch.mul, lambda g, a, b: g * b, lambda g, a, b: g * a, (False, True), (True, False))
DIV = Operation(
    "div", torch.div, lambda g, a, b: g / b, lambda g, a, b: -g * ((a / b) / b), (False, True), (True, True)
)
MATMUL = Operation(
    "matmul",
    torch.matmul,
    lambda g, a, b: g @ _swapped(b),
    lambda g, a, b: _swapped(a) @ g,
    (False, True),
    (True, False),
)


def _operate(call: Call, operation: Operation, a: Tensor, b: Tensor, exact: tuple[bool, bool]) -> Tensor:
    """``exact``: which operands are saved as they are."""
    wanted = tuple(
        (a.requires_grad and left) or (b.requires_grad and right)
        for left, right in zip(operation.left, operation.right, strict=True)
    )
    names = zip((a, b), wanted, exact, ("left", "right"), strict=True)
    saved = [_save(call, x, name, exact=as_it_is) if needed else None for x, needed, as_it_is, name in names]
    recipes = tuple(each and each.recipe for each in saved)
    tensors = [each.tensors if each is not None else () for each in saved]
    output: Tensor = DropITOperationFunction.apply(
        a, b, operation, _anchor_of(a, b), recipes, len(tensors[0]), *tensors[0], *tensors[1]
    )
    if operation is MATMUL or None in saved:  # a product of matrices takes longer to compute than codes to read
        return output
    left, right = saved
    return call.saver.publish(output, left.combine(operation.name, operation.function, right))


def _save(call: Call, x: Tensor, name: str, *, exact: bool) -> Saved:
    return Saved.of(keep_dense(x)) if exact else call.saver.save_whole(x, call.role(name))


def _anchor_of(a: Tensor, b: Tensor) -> Tensor | None:
    anchors = [each for each in (anchor(a), anchor(b)) if each is not None]
    return torch.cat([each.to(a.dtype) for each in anchors]) if anchors else None


def _is_exact(x: Tensor, size: int) -> bool:
    """Whether an operand of a result of ``size`` elements is to be saved as it is."""
    base = x if x._base is None else x._base
    return isinstance(base, nn.Parameter) or x.numel() < _SMALL or x.numel() * _BROADCAST <= size


def _broadcast_size(a: Tensor, b: Tensor) -> int:
    return torch.broadcast_shapes(a.shape, b.shape).numel()


@stands_in_for("mul", "multiply")
def _mul(call: Call, a: Any, b: Any, **others: Any) -> Any:
    if others:
        return NotImplemented
    if not tensors_of(a, b):
        return _scaled(call, a, b)
    if not (a.requires_grad and b.requires_grad):
        return NotImplemented
    size = _broadcast_size(a, b)
    return _operate(call, MUL, a, b, (_is_exact(a, size), _is_exact(b, size)))


def _scaled(call: Call, x: Any, factor: Any) -> Any:
    """A product with a number saves nothing; its output can be restored if ``x`` can."""
    published = call.saver.memo.published(x) if tensors_of(x) and isinstance(factor, (int, float)) else None
    if published is None or not x.requires_grad:
        return NotImplemented
    return call.saver.memo.publish(x * factor, published.map("scale", partial(torch.mul, other=factor)))


@stands_in_for("div", "divide", "true_divide")
def _div(call: Call, a: Any, b: Any, **others: Any) -> Any:
    if others or not tensors_of(a, b) or not b.requires_grad:
        return NotImplemented
    return _operate(call, DIV, a, b, (_is_exact(a, _broadcast_size(a, b)), True))


@stands_in_for("matmul", "bmm", "__matmul__")
def _matmul(call: Call, a: Any, b: Any, **others: Any) -> Any:
    if others or not tensors_of(a, b) or min(a.dim(), b.dim()) < 2 or not (a.requires_grad or b.requires_grad):
        return NotImplemented
    a, b = autocast(a, b)
    return _operate(call, MATMUL, a, b, (_is_exact(a, a.numel()), _is_exact(b, b.numel())))


class DropITPowerFunction(LayerFunction):
    """y = x ** n, for n = 2, 3, ..."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor, exponent: int, anchor: Tensor | None, recipe: Recipe, *saved: Tensor | None
    ) -> Tensor:
        """The plain forward."""
        return input.pow(exponent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the input."""
        undefined_gradients_as_none(ctx)
        input, ctx.exponent, anchor, ctx.recipe, *saved = inputs
        ctx.dtype = input.dtype
        ctx.save_for_backward(anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output * n * x ** (n - 1)."""
        anchor, *saved = ctx.saved_tensors
        x = ctx.recipe.restore(*saved)
        factor = x if ctx.exponent == 2 else x.pow(ctx.exponent - 1)
        grad = (grad_output * (factor * ctx.exponent)).to(ctx.dtype)
        return first_order_only(grad, anchor), None, None, None, *[None] * len(saved)


@stands_in_for("pow", "__pow__")
def _pow(call: Call, x: Any, exponent: Any, **others: Any) -> Any:
    if others or not tensors_of(x) or isinstance(exponent, Tensor) or exponent not in (2, 3, 4):
        return NotImplemented
    if not x.requires_grad or _is_exact(x, x.numel()):
        return NotImplemented
    saved = call.saver.save_whole(x, call.role("input"))
    output: Tensor = DropITPowerFunction.apply(x, int(exponent), anchor(x), saved.recipe, *saved.tensors)
    return call.saver.publish(output, saved.map("pow", partial(torch.pow, exponent=int(exponent))))


@stands_in_for("square")
def _square(call: Call, x: Any, **others: Any) -> Any:
    return _pow(call, x, 2, **others)


class DropITSoftmaxFunction(LayerFunction):
    """y = softmax(x) along ``dim``. The gradient is computed from y as it is restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor, output: Tensor, dim: int, anchor: Tensor | None, recipe: Recipe, *saved: Tensor | None
    ) -> Tensor:
        """Give ``output`` its place in the graph."""
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the output."""
        undefined_gradients_as_none(ctx)
        input, computed, ctx.dim, anchor, ctx.recipe, *saved = inputs
        ctx.mark_dirty(computed)
        ctx.dtype = input.dtype
        ctx.save_for_backward(anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """y * (grad_output - sum(y * grad_output))."""
        anchor, *saved = ctx.saved_tensors
        y = ctx.recipe.restore(*saved)
        grad = y * (grad_output - (y * grad_output).sum(dim=ctx.dim, keepdim=True))
        return first_order_only(grad.to(ctx.dtype), anchor), *[None] * (len(saved) + 4)


@stands_in_for("softmax")
def _softmax(call: Call, x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, **others: Any) -> Any:
    if others or not isinstance(dim, int) or not tensors_of(x) or not x.requires_grad or _is_exact(x, x.numel()):
        return NotImplemented
    if isinstance(_stacklevel, torch.dtype):  # torch.softmax(x, dim, dtype)
        dtype = _stacklevel
    with torch.no_grad():
        output = torch.softmax(x.detach(), dim, dtype)
    if not call.saver.policy.narrows(output):
        return NotImplemented
    saved = Saved.of(call.saver.quantize(output, call.role("output")), "output")
    output = DropITSoftmaxFunction.apply(x, output, dim, anchor(x), saved.recipe, *saved.tensors)
    return call.saver.publish(output, saved)
