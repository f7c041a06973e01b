"""Stored: what a layer keeps of a tensor, and how that gives the tensor back; and tensors that come back for nothing.

A normalization that keeps its normalized input in few bits can give its output back from them. It offers that: a layer
that reads the output stores nothing of its own, and drops nothing from it. So does an activation between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dropit import ops
from dropit.packed import Layout, Packed, is_dense_in_memory, layout_of, unflatten
from dropit.snapshot import Snapshot
from dropit.tracing import is_traced


class Stored(NamedTuple):
    """``restore(*tensors)`` is the dense tensor, or close to it. ``tensors`` are what autograd is to save."""

    restore: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, packed: Packed) -> Stored:
        """What is packed comes back by unpacking."""
        return cls(partial(_unpack, packed.layout), (packed.values, packed.positions, packed.scales))

    def cast(self, dtype: torch.dtype) -> Stored:
        """The same in ``dtype``."""
        return self.then(partial(_cast, dtype))

    def then(self, function: Callable[..., Tensor], *tensors: Tensor | None) -> Stored:
        """What gives ``function(restored, *tensors)``."""
        return Stored(partial(_then, function, self.restore, len(self.tensors)), (*self.tensors, *tensors))


def _unpack(layout: Layout, values: Tensor, positions: Tensor | None, scales: Tensor | None) -> Tensor:
    return ops.unpack(Packed(values, positions, scales, layout))


def _then(function: Callable[..., Tensor], restore: Callable[..., Tensor], count: int, *tensors: Any) -> Tensor:
    return function(restore(*tensors[:count]), *tensors[count:])


def _cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype)


class Offered(NamedTuple):
    """What was offered for a tensor. ``stored``: None where it is not to be had here, and must be stored anew."""

    stored: Stored | None
    bits: int  # of each element, as the layer that offers it stores it

    def cast(self, dtype: torch.dtype) -> Offered:
        """The same in ``dtype``."""
        return self.then(partial(_cast, dtype))

    def then(self, function: Callable[..., Tensor], *tensors: Tensor | None) -> Offered:
        """What is on offer for ``function`` of the tensor."""
        return self._replace(stored=self.stored and self.stored.then(function, *tensors))


class _Offer(NamedTuple):
    snapshot: Snapshot
    versions: tuple[int, ...]  # of what is stored
    offered: Offered


_offers: Any = WeakTensorKeyDictionary()  # entries die with their tensor


def offer(x: Tensor, offered: Offered | None) -> Tensor:
    """Have whoever reads ``x`` store nothing more than another layer stores anyway. Returns ``x``.

    With ``offered.stored`` None they are told only that such a layer lies before them, so that they do not drop from
    ``x``: within the first run of a checkpointed region nothing is stored.
    """
    # A compiler cannot tell whether x is changed in place later on.
    if offered is not None and not is_traced() and not x.is_inference():
        _offers[x] = _Offer(Snapshot.of(x), _versions(offered.stored), offered)
    return x


def offered(x: Tensor) -> Offered | None:
    """What was offered for ``x``, or for the tensor that it is another view of; nothing if that was changed since.

    It comes without ``stored`` if this was changed since, or if ``x`` is read in another scope than it was made in.
    """
    if is_traced() or x.is_inference():
        return None
    base = x if x._base is None else x._base
    for source in (x, base):
        found: _Offer | None = _offers.get(source)
        if found is None or not found.snapshot.matches(source):
            continue
        known = found.offered
        if found.versions != _versions(known.stored) or not found.snapshot.scope.is_current():
            known = known._replace(stored=None)
        if source is x:
            return known.cast(x.dtype)
        if x.numel() == source.numel() and is_dense_in_memory(x) and is_dense_in_memory(source):
            return known.then(partial(_seen_as, layout_of(source), layout_of(x)))
    return None


def _versions(stored: Stored | None) -> tuple[int, ...]:
    if stored is None:
        return ()
    return tuple(-1 if x is None or x.is_inference() else x._version for x in stored.tensors)


def _seen_as(source: Layout, layout: Layout, dense: Tensor) -> Tensor:
    """The same elements, in the same order in memory, under another shape."""
    return unflatten(dense.permute(source.order).reshape(-1).to(layout.dtype), layout)
