"""What the layers' autograd Functions have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from dropit.tracing import is_traced


def undefined_gradients_as_none(ctx: Any) -> None:
    """Pass None to backward, and not zeros, for an output that has no gradient."""
    if not is_traced():
        ctx.set_materialize_grads(False)


def none_for_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return no gradients where the output has none, as PyTorch's operators do: a parameter then has none."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if grad_outputs[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grad_outputs)

    return checked


def wanted_gradients(ctx: Any, count: int) -> tuple[bool, ...]:
    """Return of which of the first ``count`` arguments this backward pass wants the gradient.

    ``ctx.needs_input_grad`` is of all backward passes: also of ``torch.autograd.grad`` by the input alone, in which
    PyTorch's operators do not compute a weight's gradient either. The arguments are tensors; None at the end.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad[:count]
    if is_traced():
        return needs
    edges = ctx.next_functions
    return tuple(need and _is_executed(edges[place][0]) for place, need in enumerate(needs))


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[no-any-return]
    except RuntimeError:  # a leaf by which torch.autograd.grad differentiates, or no pass of autograd's engine
        return True


def anchor(*tensors: Tensor) -> Tensor | None:
    """No element of the tensors, but what depends on them under torch.func, for :func:`first_order_only`; else None."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return torch.cat([x.reshape(-1)[:0].to(tensors[0].dtype) for x in tensors])


def _no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "DropIT's layers have no forward-mode derivative; dropit.from_dropit(model) gives the plain layers back"
    )


class LayerFunction(Function):
    """A layer's node in the graph. Takes all arguments by position.

    A subclass has ``forward`` and ``setup_context`` apart, as torch.func wants it. Where nothing transforms the call,
    :func:`apply` calls a class of both in one: PyTorch takes 30 to 100 us to bind arguments to the other's signature.
    """

    _at_once: ClassVar[type[Function]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Make the class of both in one."""
        super().__init_subclass__(**keywords)

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            return cls.backward(ctx, *grads)

        methods = {"forward": forward, "backward": backward, "jvp": _no_forward_mode}
        methods = {name: staticmethod(method) for name, method in methods.items()}
        cls._at_once = type(cls.__name__, (Function,), methods)


def apply(function: type[LayerFunction], *args: Any) -> Any:
    """The output of ``function.forward``, in the graph."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function._at_once.apply(*args)


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """``args``, with a view in the place of a tensor that is there before: a compiler takes none twice."""
    given: list[Any] = []
    tensors: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            for other in tensors:  # a compiler traces a loop sooner than a generator
                if arg is other:
                    arg = arg.view_as(arg)
                    break
            tensors.append(arg)
        given.append(arg)
    return given


def in_place(inplace: bool, input: Tensor, call: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """Return ``call(input, inplace)``, computed on a copy where a compiler loses the gradient of what is changed."""
    if inplace and torch.compiler.is_compiling():
        return input.copy_(call(input.clone(), False))
    return call(input, inplace)


class _FirstOrderOnly(Function):
    """Identity, in the graph of ``through``, that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, through: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:  # type: ignore[override]
        raise RuntimeError(
            "a gradient that was computed from a packed input cannot be differentiated again; "
            "dropit.from_dropit(model) gives second derivatives back"
        )


def first_order_only(grad: Tensor, through: Tensor | None = None) -> Tensor:
    """``grad``, which is an error to differentiate: autograd knows nothing of the input that was packed.

    ``through``: what requires a gradient wherever ``grad`` has a derivative, under torch.func an :func:`anchor` of what
    was packed; None where that cannot be told.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad  # no create_graph, so no second derivative
    if through is None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return grad  # torch.func differentiates always; a leaf from here would leak out of it
        through = torch.zeros((), requires_grad=True)
    return _FirstOrderOnly.apply(grad, through)  # type: ignore[no-any-return]


class _WithZeros(Function):
    """Identity, in the graph of ``link``, to which it gives a gradient of zeros."""

    @staticmethod
    def forward(grad: Tensor, link: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        undefined_gradients_as_none(ctx)
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, None) if grad is None else (grad, grad.new_zeros(ctx.shape))


def link_to(x: Tensor) -> tuple[Tensor] | None:
    """What :func:`with_zeros` takes, for a Function that saves nothing of ``x`` that is in its graph.

    In a tuple, which a Function takes as it is: no gradient goes that way but a second one.
    """
    if not x.requires_grad or is_traced():
        return None
    # No element of x, but in its graph, by an operator that saves nothing: 4 us.
    return (torch.constant_pad_nd(x, [0, -x.shape[-1]] if x.dim() else []),)


def with_zeros(grad: Tensor, link: tuple[Tensor] | None) -> Tensor:
    """``grad``, of which the derivative by the layer's input is zeros, and not none.

    So have PyTorch's operators it, whose derivative is constant but where it jumps: under a gradient penalty the
    parameters before them have gradients of zeros, which an optimizer with momentum or weight decay does not ignore.
    """
    if link is None or not torch.is_grad_enabled():
        return grad
    return _WithZeros.apply(grad, *link)  # type: ignore[no-any-return]
