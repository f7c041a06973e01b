"""Who looks on while a model runs: compilers, and the function transforms of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor


def is_mapped(x: Tensor) -> bool:
    """Whether ``x`` is one of many under torch.func.vmap, where no shape may depend on the values."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)


def is_traced() -> bool:
    """Whether a compiler or torch.func looks on: tensors have no storage then, and a backward pass none within it."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
