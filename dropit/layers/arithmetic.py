"""Products, quotients, powers, norms and softmax in a module's own code.

What their derivatives need is saved in few bits, each operand for its own derivative alone. What must be exact is saved
as it is: denominators, parameters, and operands that are small beside the result, such as a norm's 1 / deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropit.layers.activation import SIGMOID_FLOOR
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
from dropit.layers.functions import Call, are_dense, is_of_parameter, stands_in_for, wants_gradient
from dropit.saved import Recipe, Saved
from dropit.tracing import is_mapped

_SMALL = 256  # elements that are not worth a scale
_BROADCAST = 16  # times that an operand is repeated to be small beside the result


class Product(NamedTuple):
    """y = beta * c + a * b with one of several meanings of *. Each gradient is a function of y's, a and b.

    ``function(a, b)``, or of a, b and c where there is a c. ``needed``: by the gradient of a, and of b: whether a, b.
    """

    name: str
    function: Callable[..., Tensor]
    grad_a: Callable[[Tensor, Any, Any], Tensor]
    grad_b: Callable[[Tensor, Any, Any], Tensor]
    needed: tuple[tuple[bool, bool], tuple[bool, bool]] = ((False, True), (True, False))
    beta: float = 1.0


class DropITProductFunction(LayerFunction):
    """y = c + a * b. The gradients are computed from a and b as they are restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        product: Product,
        anchor: Tensor | None,
        recipes: tuple[Recipe | None, Recipe | None],
        count: int,
        *saved: Tensor | None,
    ) -> Tensor:
        """The plain forward; the first ``count`` of ``saved`` restore a, the others b."""
        return as_non_view(product.function(a, b) if c is None else product.function(a, b, c))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the factors."""
        undefined_gradients_as_none(ctx)
        a, b, c, ctx.product, anchor, ctx.recipes, ctx.count, *saved = inputs
        ctx.forms = tuple((x.shape, x.dtype) if x is not None else None for x in (a, b, c))
        ctx.save_for_backward(anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of a, b and c, each in its shape and dtype."""
        anchor, *saved = ctx.saved_tensors
        parts = saved[: ctx.count], saved[ctx.count :]
        a, b = (recipe and recipe.restore(*part) for recipe, part in zip(ctx.recipes, parts, strict=True))
        functions, wanted = (ctx.product.grad_a, ctx.product.grad_b), wanted_gradients(ctx, 3)
        grads = [
            first_order_only(_formed(function(grad_output, a, b), form), anchor) if is_wanted else None
            for function, is_wanted, form in zip(functions, wanted[:2], ctx.forms[:2], strict=True)
        ]
        grad_c = None
        if wanted[2]:
            beta = ctx.product.beta
            grad_c = _formed(grad_output if beta == 1 else beta * grad_output, ctx.forms[2])
        return *grads, grad_c, *[None] * (len(saved) + 4)


def _formed(grad: Tensor, form: tuple[torch.Size, torch.dtype]) -> Tensor:
    """``grad``, summed over what was broadcast."""
    shape, dtype = form
    return grad.sum_to_size(shape).to(dtype)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


MUL = Product("mul", torch.mul, lambda g, a, b: g * b, lambda g, a, b: g * a)
ADDCMUL = MUL._replace(name="addcmul", function=lambda a, b, c: torch.addcmul(c, a, b))
DIV = Product(
    "div", torch.div, lambda g, a, b: g / b, lambda g, a, b: -g * ((a / b) / b), ((False, True), (True, True))
)
MATMUL = Product("matmul", torch.matmul, lambda g, a, b: g @ _transposed(b), lambda g, a, b: _transposed(a) @ g)
BADDBMM = MATMUL._replace(name="baddbmm", function=lambda a, b, c: torch.baddbmm(c, a, b))
ADDMM = MATMUL._replace(name="addmm", function=lambda a, b, c: torch.addmm(c, a, b))


def _multiply(
    call: Call, product: Product, a: Tensor, b: Tensor, c: Tensor | None = None, exact_b: bool = False
) -> Any:
    by_factor = zip(*product.needed, strict=True)
    needed = [(of_a and a.requires_grad) or (of_b and b.requires_grad) for of_a, of_b in by_factor]
    elementwise = product.grad_a in (MUL.grad_a, DIV.grad_a)
    size = torch.broadcast_shapes(a.shape, b.shape).numel() if elementwise else 0
    exact = _is_exact(a, size), exact_b or _is_exact(b, size)
    outer = max(a.numel(), b.numel()) < size  # which is worth to be restored from its operands
    if not outer and all(as_it_is or not wanted for as_it_is, wanted in zip(exact, needed, strict=True)):
        return NotImplemented  # there is nothing to gain
    left, right = (
        (Saved.exactly(x) if as_it_is else call.saver.save_whole(x, call.role(name))) if wanted else None
        for x, wanted, as_it_is, name in zip((a, b), needed, exact, ("a", "b"), strict=True)
    )
    recipes, tensors = (left and left.recipe, right and right.recipe), () if left is None else left.tensors
    others = () if right is None else right.tensors
    output: Tensor = apply(
        DropITProductFunction, a, b, c, product, anchor(a, b), recipes, len(tensors), *tensors, *others
    )
    # A product of matrices takes longer to compute than its codes to read.
    if left is None or right is None or c is not None or not elementwise:
        return output
    return call.saver.publish(output, left.combine(product.name, product.function, right, pointwise=True))


def _is_exact(x: Tensor, size: int = 0) -> bool:
    """Whether an operand of a result of ``size`` elements is to be saved as it is."""
    return is_of_parameter(x) or x.numel() < _SMALL or x.numel() * _BROADCAST <= size or _is_saved_part(x)


def _is_saved_part(x: Tensor) -> bool:
    """Whether ``x`` is a part of a tensor that is saved whole, as an exponential's output is for its derivative.

    So are the decays of a recurrence that a loop computes, whose rounding errors would add up over its steps.
    """
    if torch.compiler.is_compiling():
        return False
    return x._base is not None and x.numel() < x._base.numel() and hasattr(type(x._base.grad_fn), "_saved_result")


@stands_in_for("mul", "multiply")
def _mul(call: Call, input: Any, other: Any = None, **more: Any) -> Any:
    if more:
        return NotImplemented
    if isinstance(other, (int, float)):
        return _scale(call, input, partial(torch.mul, other=other))
    if not are_dense(input, other):
        return NotImplemented
    if not other.requires_grad:
        return _scale(call, input, torch.mul, other)
    return _multiply(call, MUL, input, other) if input.requires_grad else _scale(call, other, _from_left, input)


def _from_left(x: Tensor, factor: Tensor) -> Tensor:
    """The product, whose layout in memory is that of its first operand where there is a choice."""
    return factor * x


def _scale(call: Call, x: Any, function: Callable[..., Tensor], *factor: Tensor) -> Any:
    """A product with what wants no gradient saves that alone; its output can be restored if ``x`` can."""
    published = call.saver.memo.published(x) if wants_gradient(x) else None
    if published is None:
        return NotImplemented
    return call.saver.memo.publish(function(x, *factor), published.map("scale", function, *factor))


@stands_in_for("addcmul")
def _addcmul(call: Call, input: Any, tensor1: Any = None, tensor2: Any = None, *deprecated: Any, **more: Any) -> Any:
    if more or deprecated or not are_dense(input, tensor1, tensor2):
        return NotImplemented
    if not (tensor1.requires_grad and tensor2.requires_grad):
        return NotImplemented
    return _multiply(call, ADDCMUL, tensor1, tensor2, input)


@stands_in_for("div", "divide", "true_divide")
def _div(call: Call, input: Any, other: Any = None, **more: Any) -> Any:
    if more or not are_dense(input, other) or not other.requires_grad:
        return NotImplemented
    return _multiply(call, DIV, input, other, exact_b=True)


@stands_in_for("matmul", "__matmul__")
def _matmul(call: Call, input: Any, other: Any = None, **more: Any) -> Any:
    fits = not more and are_dense(input, other) and wants_gradient(input, other)
    return (
        _multiply(call, MATMUL, *autocast(input, other))
        if fits and min(input.dim(), other.dim()) > 1
        else NotImplemented
    )


@stands_in_for("bmm", "mm")
def _mm(call: Call, input: Any, mat2: Any = None, **more: Any) -> Any:
    return _matmul(call, input, mat2, **more)


@stands_in_for("baddbmm")
def _baddbmm(call: Call, input: Any, batch1: Any = None, batch2: Any = None, *deprecated: Any, **more: Any) -> Any:
    return NotImplemented if deprecated else _add_product(call, BADDBMM, input, batch1, batch2, **more)


@stands_in_for("addmm")
def _addmm(call: Call, input: Any, mat1: Any = None, mat2: Any = None, *deprecated: Any, **more: Any) -> Any:
    return NotImplemented if deprecated else _add_product(call, ADDMM, input, mat1, mat2, **more)


def _add_product(
    call: Call, product: Product, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1, **more: Any
) -> Any:
    if more or not are_dense(a, b, c) or not wants_gradient(a, b) or not a.dim() == b.dim() > 1:
        return NotImplemented
    if (beta, alpha) != (1, 1):
        product = _weighted(product, beta, alpha)
    c, a, b = autocast(c, a, b)
    return _multiply(call, product, a, b, c)


def _weighted(product: Product, beta: float, alpha: float) -> Product:
    """Return beta * c + alpha * a * b."""
    function = torch.addmm if product is ADDMM else torch.baddbmm
    return product._replace(
        function=lambda a, b, c: function(c, a, b, beta=beta, alpha=alpha),
        grad_a=lambda g, a, b: alpha * product.grad_a(g, a, b),
        grad_b=lambda g, a, b: alpha * product.grad_b(g, a, b),
        beta=beta,
    )


@stands_in_for("einsum")
def _einsum(call: Call, equation: Any, *operands: Any) -> Any:
    """Of two operands, each of whose indices the other one or the result has."""
    a, b = operands if len(operands) == 2 else (None, None)
    if not isinstance(equation, str) or not are_dense(a, b) or not wants_gradient(a, b):
        return NotImplemented
    given, arrow, result = equation.replace(" ", "").partition("->")
    left, _, right = given.partition(",")
    parts = (left, right, result)
    repeated = any(len(set(part)) < len(part) for part in parts) or "." in equation or not arrow
    if repeated or not set(left) <= set(right + result) or not set(right) <= set(left + result):
        return NotImplemented
    product = Product(
        "einsum",
        partial(torch.einsum, equation),
        lambda g, a, b: _contracted(result, right, left, g, b),
        lambda g, a, b: _contracted(left, result, right, a, g),
    )
    if not set(left + right) <= set(result):  # else it is a product of elements, which autocast leaves as it is
        operands = autocast(*operands)
    return _multiply(call, product, *operands)


def _contracted(left: str, right: str, result: str, a: Tensor, b: Tensor) -> Tensor:
    """Of two operands by their indices, those of ``result`` first and the others summed."""
    if not (is_mapped(a) or is_mapped(b)):
        return torch.einsum(f"{left},{right}->{result}", a, b)
    # The vmap of autograd's is_grads_batched does not know einsum.
    letters = result + "".join(sorted(set(left + right) - set(result)))
    product = _aligned(a, left, letters) * _aligned(b, right, letters)
    return product if letters == result else product.sum(tuple(range(len(result), len(letters))))


def _aligned(x: Tensor, own: str, letters: str) -> Tensor:
    """``x``, whose dimensions ``own`` names, with one for each of ``letters``: of size 1 where it has none."""
    x = x.permute([own.index(letter) for letter in letters if letter in own])
    for dim, letter in enumerate(letters):
        x = x if letter in own else x.unsqueeze(dim)
    return x


class Unary(NamedTuple):
    """y = function(x), and the gradient of x from that of y and x, or y where it is ``from_output``.

    ``gradient(grad, saved, y)``: the y is exact where it is ``keeps_output``, and None elsewhere. ``bound(bits, x)``:
    what is saved in the place of x.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Any], Tensor]
    bound: Callable[[int, Tensor], Tensor] | None = None
    from_output: bool = False
    keeps_output: bool = False


class DropITUnaryFunction(LayerFunction):
    """y = f(x). The gradient is computed from x or y as it is restored."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        output: Tensor | None,
        unary: Unary,
        anchor: Tensor | None,
        recipe: Recipe,
        *saved: Tensor | None,
    ) -> Tensor:
        """The plain forward, or ``output`` where it has been computed."""
        return unary.function(input) if output is None else output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what restores the input or the output."""
        undefined_gradients_as_none(ctx)
        input, computed, ctx.unary, anchor, ctx.recipe, *saved = inputs
        if computed is not None:
            ctx.mark_dirty(computed)
        ctx.dtype = input.dtype
        ctx.save_for_backward(output if ctx.unary.keeps_output else None, anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The input's gradient, in its dtype."""
        output, anchor, *saved = ctx.saved_tensors
        grad = ctx.unary.gradient(grad_output, ctx.recipe.restore(*saved), output).to(ctx.dtype)
        return first_order_only(grad, anchor), *[None] * (len(saved) + 4)


def apply_unary(call: Call, unary: Unary, x: Tensor) -> Any:
    """Compute ``unary`` of ``x``, and save in few bits what its gradient needs; NotImplemented if that gains none."""
    if not wants_gradient(x) or _is_exact(x):
        return NotImplemented
    saver = call.saver
    if unary.from_output:
        with torch.no_grad():
            output = unary.function(x.detach())
        if not saver.policy.narrows(output):
            return NotImplemented
        saved = Saved.of(saver.quantize(output, call.role("output")), "output")
        output = apply(DropITUnaryFunction, x, output, unary, anchor(x), saved.recipe, *saved.tensors)
        return saver.publish(output, saved)
    if unary.bound is not None and saver.bits is not None:
        saved = Saved.of(saver.quantize(unary.bound(saver.bits, x.detach()), call.role("input")))
    else:
        saved = saver.save_whole(x, call.role("input"))
    output = apply(DropITUnaryFunction, x, None, unary, anchor(x), saved.recipe, *saved.tensors)
    return output if unary.keeps_output else saver.publish(output, saved.map(unary.name, unary.function))


@stands_in_for("pow", "__pow__")
def _pow(call: Call, input: Any, exponent: Any = None, **more: Any) -> Any:
    if more or isinstance(exponent, Tensor) or exponent not in (2, 3, 4):
        return NotImplemented
    power = partial(torch.pow, exponent=exponent)
    return apply_unary(call, Unary("pow", power, partial(_pow_gradient, int(exponent))), input)


def _pow_gradient(exponent: int, grad: Tensor, x: Tensor, _: Any) -> Tensor:
    return grad * ((x if exponent == 2 else x.pow(exponent - 1)) * exponent)


@stands_in_for("square")
def _square(call: Call, input: Any, **more: Any) -> Any:
    return (
        NotImplemented if more else apply_unary(call, Unary("square", torch.square, partial(_pow_gradient, 2)), input)
    )


@stands_in_for("exp")
def _exp(call: Call, input: Any, **more: Any) -> Any:
    """An exponential must be exact: all else of a group in few bits is lost beside one large element."""
    published = call.saver.memo.published(input) if not more and wants_gradient(input) else None
    if published is None or published.saved is None or not published.saved.recipe.pointwise or _is_exact(input):
        return NotImplemented
    with torch.no_grad():
        output = torch.exp(input.detach())
    exp = Unary("exp", torch.exp, lambda grad, y, _: grad * y, from_output=True)
    saved = published.saved.cast(output.dtype).map("exp", torch.exp, pointwise=True)
    output = apply(DropITUnaryFunction, input, output, exp, anchor(input), saved.recipe, *saved.tensors)
    return call.saver.publish(output, saved)


@stands_in_for("glu")
def _glu(call: Call, input: Any, dim: int = -1) -> Any:
    gradient = torch.ops.aten.glu_backward
    function = partial(torch.nn.functional.glu, dim=dim)
    return apply_unary(
        call, Unary("glu", function, lambda grad, x, _: gradient(grad, x, dim), partial(_bound_gate, dim)), input
    )


def _bound_gate(dim: int, bits: int, x: Tensor) -> Tensor:
    """Bound the half that sigmoid takes where that saturates, so that what is huge or infinite is of no effect."""
    a, b = x.chunk(2, dim)
    return torch.cat([a, b.clamp(min=SIGMOID_FLOOR[bits])], dim)


@stands_in_for("softmax")
def _softmax(call: Call, input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None, **more: Any) -> Any:
    if more or not isinstance(dim, int):
        return NotImplemented
    if isinstance(_stacklevel, torch.dtype):  # torch.softmax(x, dim, dtype)
        dtype = _stacklevel
    function = partial(torch.softmax, dim=dim, dtype=dtype)
    return apply_unary(call, Unary("softmax", function, partial(_softmax_gradient, dim), from_output=True), input)


def _softmax_gradient(dim: int, grad: Tensor, y: Tensor, _: Any) -> Tensor:
    return y * (grad - (y * grad).sum(dim=dim, keepdim=True))


@stands_in_for("norm", homes=(torch.linalg,))
def _linalg_norm(
    call: Call, input: Any = None, ord: Any = None, dim: Any = None, keepdim: bool = False, **more: Any
) -> Any:
    """With a number and two dimensions it is another norm, of matrices."""
    of_vectors = ord is None or isinstance(dim, int)
    return _norm(call, input, ord, dim, keepdim, **more) if of_vectors else NotImplemented


@stands_in_for("norm", homes=(torch, Tensor))
@stands_in_for("vector_norm", "linalg_vector_norm")
def _norm(call: Call, input: Any, p: Any = None, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    order = more.pop("ord", p)
    if any(value is not None for value in more.values()) or order not in (None, 2, "fro") or dim is None:
        return NotImplemented
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if order == "fro" and len(dims) > 2:
        return NotImplemented
    function = partial(torch.linalg.vector_norm, dim=dims, keepdim=keepdim)
    return apply_unary(call, Unary("norm", function, partial(_norm_gradient, dims, keepdim), keeps_output=True), input)


def _norm_gradient(dims: tuple[int, ...], keepdim: bool, grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """grad * x / |x|, or 0 where |x| is."""
    if not keepdim:
        for dim in sorted(each % x.dim() for each in dims):
            grad, norm = grad.unsqueeze(dim), norm.unsqueeze(dim)
    return (x * (grad / norm)).masked_fill_(norm == 0, 0)


@stands_in_for("normalize")
def _normalize(call: Call, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    norm = NotImplemented if out is not None or not wants_gradient(input) else _norm(call, input, p, dim, keepdim=True)
    if norm is NotImplemented:
        return NotImplemented
    return _multiply(call, DIV, input, norm.clamp_min(eps).expand_as(input), exact_b=True)


@stands_in_for("_grouped_mm")
def _grouped_mm(call: Call, input: Any, mat2: Any = None, offs: Any = None, **more: Any) -> Any:
    fits = offs is not None and all(value is None for value in more.values()) and are_dense(input, mat2)
    if not fits or not wants_gradient(input, mat2) or (input.dim(), mat2.dim()) != (2, 3):
        return NotImplemented
    grouped = partial(torch._grouped_mm, offs=offs)
    product = Product(
        "grouped_mm",
        grouped,
        lambda grad, a, b: grouped(grad, _transposed(b)),
        lambda grad, a, b: grouped(_transposed(a), grad),
    )
    return _multiply(call, product, input, mat2)
