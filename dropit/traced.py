"""Notes on tensors within a graph that torch.compile traces.

There a tensor has no storage, and no dict knows it weakly; what Python code can do is to give it an attribute, which
vanishes with the trace unless the tensor leaves the graph. Whether the tensor was changed in place since is asked of
the fake tensor that the compiler traces with, which has a version as real ones do.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

_versions: list[int] = []  # of the tensors that _Versions was given
_numbers = count()


def attach(x: Tensor, note: Any, *tensors: Tensor | None) -> Tensor:
    """Return ``x`` with a note that holds until it or one of ``tensors`` is changed in place."""
    x = x.view_as(x)  # as what a Function returns cannot be given an attribute
    setattr(x, _attribute(), (note, tensors, _versions_of(x, *tensors)))
    return x


def attached(x: Tensor) -> Any:
    """Return the note on ``x``, or None where there is none that still holds."""
    found = getattr(x, _attribute(), None)
    if found is None:
        return None
    note, tensors, versions = found
    return note if versions == _versions_of(x, *tensors) else None


def _versions_of(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple([-1 if x is None else _version(x) for x in tensors])


def _version(x: Tensor) -> int:
    from torch._dynamo.comptime import comptime

    comptime(_read_version)
    version: int = _last_version()
    return version


def _read_version(context: Any) -> None:
    _versions.append(context.get_local("x").as_fake()._version)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _last_version() -> int:
    return _versions.pop()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attribute() -> str:
    """Return the attribute's name: one for each trace, so that no graph reads what another one left."""
    context: Any = TracingContext.try_get()
    if not hasattr(context, "dropit_number"):
        context.dropit_number = next(_numbers)
    return f"_dropit_{context.dropit_number}"
