"""Snapshot: whether a tensor is still what it was when something was derived from it.

What is derived from a tensor for the backward pass (its packed copy, what another layer saves of it) is given
to a second reader only if the tensor is unchanged and if the second reader saves for the same backward pass.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dropit.ops import native

_ROW = 256  # elements that a digest has one number for


class Scope(NamedTuple):
    """Where tensors are saved: within which backward pass, if any, and by which saved-tensors hook, if any.

    Activation checkpointing runs a forward pass twice, the second time within the backward pass, and each of its
    regions has a hook of its own. A region sees the same in both runs if it uses nothing from outside of its scope.
    """

    graph_task: int
    hook: Callable[[], Any] | None  # a weak reference

    @classmethod
    def current(cls) -> Scope:
        """The scope of what is saved now."""
        hook = _innermost_hook()
        return cls(graph_task(), None if hook is None else _weakly(hook))

    def is_current(self) -> bool:
        """Whether what is saved now belongs to this scope."""
        innermost = _innermost_hook()
        if self.graph_task != graph_task() or (self.hook is None) != (innermost is None):
            return False
        return self.hook is None or self.hook() is innermost


class Snapshot(NamedTuple):
    """What tells whether a tensor was changed: its version, its form and, on a CPU, a digest of its elements.

    The version misses what is changed through ``.data``, NumPy or DLPack, or received in place. The digest finds that,
    for 0.1 ns an element, without a C compiler 0.4. On a GPU comparing digests would have the host wait for the device,
    and there is none.
    """

    version: int
    form: tuple[Any, ...]  # shape and strides
    digest: Tensor | int | None
    scope: Scope

    @classmethod
    def of(cls, x: Tensor) -> Snapshot:
        """Take a snapshot of ``x``."""
        return cls(x._version, (x.shape, x.stride()), _digest(x), Scope.current())

    def matches(self, x: Tensor) -> bool:
        """Whether ``x`` is unchanged."""
        if self.version != x._version or self.form != (x.shape, x.stride()):
            return False
        return self.digest is None or _same(self.digest, _digest(x))


def place(x: Tensor) -> tuple[Any, ...] | None:
    """Which elements of which storage ``x`` consists of: equal for a tensor and what is detached from it.

    The storage is not kept alive, but counts as another than any that is made later. None for a tensor without one.
    """
    if x.layout is not torch.strided or is_traceable_wrapper_subclass(x):
        return None
    return StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.shape, x.stride()


def graph_task() -> int:
    """The number of the backward pass that is running in this thread, or -1."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _innermost_hook() -> Any:
    """Return the innermost saved-tensors hook, or a checkpointed region in its place."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # before torch 2.8
        return _innermost_checkpoint()
    hooks = top(True)
    return None if hooks is None else hooks[0]


def _innermost_checkpoint() -> Any:
    """The generator of the innermost region of activation checkpointing that runs, by a look at the call stack.

    Other hooks are no scope then: what they are given twice, as tensors that two layers share, they pack twice.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__ and "gen" in frame.f_locals:
            return frame.f_locals["gen"]
        frame = frame.f_back
    return None


def _weakly(hook: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(hook)
    except TypeError:
        return lambda: hook


def _digest(x: Tensor) -> Tensor | int | None:
    """A number of all bytes, by C; or for each 256 elements their product with random weights, a float."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided
    if not plain or not x.is_floating_point() or x.is_neg():
        return None
    # Hidden from autocast, and from dispatch modes that count operations.
    with torch.no_grad(), torch._C._DisableAutocast(), torch._C._DisableTorchDispatch():
        flat = x.detach()
        flat = (flat if flat.is_contiguous() else flat.permute(_outermost_first(flat))).reshape(-1)
        if native.takes(flat):
            return native.digest(flat)
        flat = flat.float() if flat.element_size() < 4 else flat
        weights, whole = _weights(flat.dtype), flat.numel() // _ROW * _ROW
        rows, rest = flat[:whole].view(-1, _ROW) @ weights, flat[whole:]
        digest = torch.cat([rows, (rest @ weights[: rest.numel()]).view(1)]) if rest.numel() else rows
        if digest.isfinite().all():
            return digest
        # What is not finite hides the others of its row; whole numbers do not.
        integers = flat.view(torch.int64 if flat.dtype is torch.float64 else torch.int32)
        places = torch.arange(1, integers.numel() + 1)
        return torch.cat([digest, (integers * places).sum().view(1).view(digest.dtype)])


def _outermost_first(x: Tensor) -> list[int]:
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda dim: -strides[dim])


@functools.cache
def _weights(dtype: torch.dtype) -> Tensor:
    return torch.rand(_ROW, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.5


def _same(a: Tensor | int, b: Tensor | int | None) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, int) and isinstance(b, int) and a == b
    integers = torch.int64 if a.dtype is torch.float64 else torch.int32
    return a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))
