"""Notes on tensors within a graph that torch.compile traces.

There a tensor has no storage, and no dict knows it weakly; what Python code can do is to give it an attribute, which
vanishes with the trace unless the tensor leaves the graph. Whether the tensor was changed in place since is asked of
the fake tensor that the compiler traces with, which has a version as real ones do.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor
from torch._guards import TracingContext

from dropit.tracing import at_trace_time

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
    return _last_version()


def _read_version(context: Any) -> None:
    _trace().dropit_version = context.get_local("x").as_fake()._version


@at_trace_time
def _last_version() -> int:
    return _trace().dropit_version  # type: ignore[no-any-return]


@at_trace_time
def _attribute() -> str:
    """Return the attribute's name: one for each trace, so that no graph reads what another one left."""
    trace = _trace()
    if not hasattr(trace, "dropit_number"):
        trace.dropit_number = next(_numbers)
    return f"_dropit_{trace.dropit_number}"


def _trace() -> Any:
    return TracingContext.try_get()
