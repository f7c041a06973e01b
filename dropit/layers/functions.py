"""Functions and operators that a module's own code calls: the table of what stands in for them, and who takes them.

A module is converted for the sake of its calls if its forward, or a function or method that this leads to, names one of
the table. While such a forward runs, a ``TorchFunctionMode`` takes the calls; it is off while a layer of DropIT's own
or another such module runs inside, so that it costs nothing there.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from dropit.saver import Saver
from dropit.snapshot import Scope
from dropit.tracing import at_trace_time


class Call(NamedTuple):
    """A call of a function: the saver of the module whose code calls it, and the number of the call in its forward."""

    saver: Saver
    number: int

    def role(self, operand: str) -> str:
        """Return what tells an operand of this call from others of the module."""
        return f"{self.number} {operand}"


# (call, *args, **kwargs) as of the function -> its output, or NotImplemented to have it computed as PyTorch does.
StandIn = Callable[..., Any]

FUNCTIONS: dict[Any, StandIn] = {}
_VIEWS: dict[Any, StandIn] = {}
_STAND_INS: list[StandIn] = []  # all of both
NAMES: set[str] = {"ALL_ATTENTION_FUNCTIONS"}  # by which code calls them; the first is a table of Hugging Face's
_CHECKPOINTS = frozenset({checkpoint, checkpoint_sequential})
_attention = F.scaled_dot_product_attention  # in whose place estimate_cache has a function of its own
_HOMES = (torch, torch.Tensor, F, torch.special, torch.linalg)
_SIGNS = {"mul": "*", "matmul": "@", "pow": "**", "div": "/"}
_OF_OPCODE = {  # of Python 3.10
    "BINARY_MULTIPLY": "*",
    "BINARY_MATRIX_MULTIPLY": "@",
    "BINARY_POWER": "**",
    "BINARY_TRUE_DIVIDE": "/",
}


def _cached(function: Callable[[type[nn.Module]], bool]) -> Callable[[type[nn.Module]], bool]:
    return functools.cache(function)  # type: ignore[return-value]  # as types have hashes


def stands_in_for(
    *names: str, unquantized: bool = False, homes: tuple[Any, ...] = _HOMES
) -> Callable[[StandIn], StandIn]:
    """Have the decorated function called in place of PyTorch's functions and Tensor's methods of these names.

    ``unquantized``: it is where nothing is quantized, too: it is lossless, or drops. ``homes``: the modules and classes
    whose functions these are, where those of others mean something else.
    """

    def enter(stand_in: StandIn) -> StandIn:
        @functools.wraps(stand_in)
        def where_quantized(call: Call, *args: Any, **kwargs: Any) -> Any:
            return NotImplemented if call.saver.bits is None else stand_in(call, *args, **kwargs)

        function = stand_in if unquantized else where_quantized
        _STAND_INS.append(function)
        for name in names:
            FUNCTIONS.update(dict.fromkeys((getattr(home, name) for home in homes if hasattr(home, name)), function))
            NAMES.update({name, _SIGNS.get(name, name)})
        return stand_in

    return enter


@_cached
def calls_functions(plain: type[nn.Module]) -> bool:
    """Whether the class's forward, or what that calls of its class or package, names a function of the table."""
    home, forward = plain.__module__, inspect.unwrap(plain.forward)
    if not isinstance(forward, FunctionType) or issubclass(plain, nn.modules.lazy.LazyModuleMixin):
        return False
    if not home.startswith("torch."):
        return _names_one(forward.__code__, forward.__globals__, plain, set())
    # Its layers call functions; its wrappers of models, as DDP, do not.
    return home.startswith("torch.nn.modules.") and _layer_names_one(forward, plain)


def _names_one(code: CodeType, namespace: dict[str, Any], plain: type, seen: set[CodeType]) -> bool:
    if code in seen:
        return False
    seen.add(code)
    if any(_is_one(value) or _leads_to_one(value, plain, seen) for value in _named(code, namespace, plain)):
        return True
    inner = (const for const in code.co_consts if isinstance(const, CodeType))  # lambdas, comprehensions
    return any(_names_one(each, namespace, plain, seen) for each in inner)


def _named(code: CodeType, namespace: dict[str, Any], plain: type) -> Iterator[Any]:
    """Yield what the code names: the value where that is known, or the name of an attribute or an operator's sign."""
    own = code.co_varnames[0] if code.co_argcount else None
    base: Any = None  # what the instruction before has loaded
    for step in dis.get_instructions(code):
        found, base = base, None
        loaded = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        if step.opname == "BINARY_OP" or step.opname in _OF_OPCODE:
            yield _OF_OPCODE.get(step.opname, step.argrepr)
        elif step.opname == "LOAD_GLOBAL":
            base = namespace.get(loaded)
            yield loaded if base is None else base
        elif step.opname.startswith("LOAD_FAST") and loaded == own:
            base = plain
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if isinstance(found, (ModuleType, type)):
                base = inspect.getattr_static(found, loaded, None)
                yield base
            elif found is None:
                yield loaded
            if "super" in code.co_names:
                yield from (vars(each).get(loaded) for each in plain.__mro__[1:] if each is not nn.Module)


def _is_one(value: Any) -> bool:
    try:
        # A compiler does not follow a mode that begins in a region of a checkpoint: it is to begin outside.
        return value in (NAMES if isinstance(value, str) else FUNCTIONS) or value in _CHECKPOINTS
    except TypeError:  # has no hash
        return False


def _leads_to_one(value: Any, plain: type, seen: set[CodeType]) -> bool:
    """Whether it is a function of Python that names one, or leads to one itself unless it is PyTorch's."""
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
    if not isinstance(value, FunctionType):
        return False
    if value.__module__.startswith("torch."):
        return value.__module__.startswith("torch.nn.modules.") and _layer_names_one(value, plain)
    return _names_one(value.__code__, value.__globals__, plain, seen)


def _layer_names_one(forward: FunctionType, plain: type) -> bool:
    """The same for a layer of PyTorch's, whose operators are between numbers."""
    named = _named(forward.__code__, forward.__globals__, plain)
    return any(_is_one(value) for value in named if value not in _SIGNS.values())


class FunctionCalls(TorchFunctionMode):
    """Has calls of the functions in the table computed by what stands in for them, with ``saver``."""

    def __init__(self, saver: Saver) -> None:
        super().__init__()
        self.suspended = 0
        self._saver, self._calls = saver, 0
        # In a region of activation checkpointing that the module's own code opens, the second run would not be seen.
        self._scope = None if torch.compiler.is_compiling() else Scope.current()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = _stand_in_of(func)
        if stand_in is None or not self._takes_calls() or self.suspended:
            return func(*args, **kwargs) if kwargs else func(*args)
        named = kwargs or {}
        self._calls += 1
        try:
            output = stand_in(Call(self._saver, self._calls), *args, **named)
        except TypeError:
            if not torch.compiler.is_compiling() and _takes(stand_in, args, named):
                raise
            return func(*args, **named)  # with arguments that only PyTorch's knows, as a deprecated signature has them
        return func(*args, **named) if output is NotImplemented else output

    def _takes_calls(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        if self._scope is None:
            return True
        if torch.compiler.is_compiling():  # a part of what runs, which sees the mode around it
            return False
        return self._scope.is_current() and not _is_transformed()


def _takes(stand_in: StandIn, args: Any, named: Any) -> bool:
    try:
        inspect.signature(stand_in).bind(None, *args, **named)
    except TypeError:
        return False
    return True


def _stand_in_of(func: Any) -> StandIn | None:
    if func is F.scaled_dot_product_attention:
        func = _attention
    if not torch.compiler.is_compiling():
        return FUNCTIONS.get(func)
    place = _place_of(func)
    return None if place < 0 else _STAND_INS[place]


@at_trace_time
def _place_of(func: Any) -> int:
    """Return where in the list is what stands in for ``func``, or -1: at trace time a number can be returned."""
    stand_in = FUNCTIONS.get(func) or _VIEWS.get(func)
    return -1 if stand_in is None else _STAND_INS.index(stand_in)


def _enter_view(function: Callable[..., Tensor]) -> None:
    """Have a compiled graph know of what it returns that it has the elements of its first argument."""

    def viewed(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not are_dense(x) or not x.requires_grad:
            return NotImplemented
        return call.saver.memo.viewed(x, lambda x: function(x, *args, **kwargs))

    _VIEWS[function] = viewed
    _STAND_INS.append(viewed)


def _enter_cast(function: Callable[..., Tensor]) -> None:
    """Have a compiled graph take a tensor for the same one if it has the dtype already, as PyTorch does."""

    def cast(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        copies = any(argument is True for argument in (*args, *kwargs.values()))
        if copies or not are_dense(x) or not x.requires_grad:
            return NotImplemented
        output = function(x, *args, **kwargs)
        unchanged = output.dtype is x.dtype and output.device == x.device and output.stride() == x.stride()
        return x if unchanged else output

    _VIEWS[function] = cast
    _STAND_INS.append(cast)


for _function in (Tensor.to, Tensor.float, Tensor.type_as):
    _enter_cast(_function)
for _name in ("view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "contiguous"):
    for _function in {getattr(home, _name) for home in (torch, Tensor) if hasattr(home, _name)}:
        _enter_view(_function)


@at_trace_time
def keep_from_frames() -> bool:
    """Have the compiler that traces this compile no call of the mode by itself, where it breaks a graph.

    There it takes an attribute that PyTorch reads through the mode, as ``grad_fn``, for a number (2.14).
    """
    from torch._dynamo.eval_frame import skip_code

    skip_code(FunctionCalls.__torch_function__.__code__)
    return True


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def run_with(mode: FunctionCalls | None, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``forward(*args, **kwargs)``, whose calls ``mode`` takes, or none does; one that did so before is off."""
    # Without a context manager, which takes longer than most of what runs between two modes.
    outer = _taker()
    if outer is not None:
        _pop_mode()
    try:
        if mode is None:
            return forward(*args, **kwargs)
        with mode:
            return forward(*args, **kwargs)
    finally:
        if outer is not None:
            _push_mode(outer)


def without_calls_taken(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward``, of a layer, by whose own code no calls are taken."""

    @functools.wraps(forward)
    def untouched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _len_torch_function_stack() == 0:
            return forward(self, *args, **kwargs)
        return run_with(None, forward, self, *args, **kwargs)

    return untouched


def _taker() -> FunctionCalls | None:
    """Return the mode that takes calls now."""
    depth = _len_torch_function_stack()
    mode = _get_function_stack_at(depth - 1) if depth else None
    return mode if isinstance(mode, FunctionCalls) else None


def are_dense(*values: Any) -> bool:
    """Return whether each is a dense tensor of floating-point numbers, and of no class with functions of its own."""
    return all(type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and not x.is_nested for x in values)


def wants_gradient(*tensors: Any) -> bool:
    """Return whether they are dense tensors, or None but for the first, and the gradient of one is wanted."""
    given = [x for x in tensors if x is not None]
    return tensors[0] is not None and are_dense(*given) and any(x.requires_grad for x in given)


def is_of_parameter(x: Tensor) -> bool:
    """Return whether ``x`` is a parameter or a view of one, which is in memory anyway."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)
