"""Whether torch.compile or a function transform of torch.func is tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def is_mapped(x: Tensor) -> bool:
    """Whether ``x`` is one of many under torch.func.vmap, where no shape may depend on the values."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)  # of autograd's is_grads_batched


def is_plain(x: Tensor) -> bool:
    """Whether the elements of ``x`` may be worked on: no compiler, transform, mode or subclass is in between."""
    return type(x) in (Tensor, nn.Parameter) and not is_traced() and torch._C._len_torch_dispatch_stack() == 0


def at_trace_time(function: Function) -> Function:
    """Have a compiler run ``function`` when it traces a call, and take what it returns for a constant. A decorator.

    That is what torch.compiler.assume_constant_result does, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_compiled() -> bool:
    """Return whether torch.compile is tracing this code, for a graph."""
    return torch.compiler.is_dynamo_compiling()


def is_traced() -> bool:
    """Whether torch.compile or torch.func is tracing: tensors have no storage then, nor is a backward pass known."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def saved_as_is(x: Tensor) -> Tensor:
    """Return ``x`` (n,), so that a compiler saves it as it is for backward, and not what is computed from it there.

    Of what a graph could save, PyTorch's partitioner takes the least, but counts a tensor twice if all its readers can
    be fused with it: codes of 8 bits would weigh more than the bfloat16 that they become. A split, here into one part,
    is a view that it does not fuse.
    """
    if not torch.compiler.is_compiling():
        return x
    whole: Tensor = x.split([x.shape[0]])[0]
    return whole
