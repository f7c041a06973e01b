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
from dropit.tracing import is_traced


class Stored(NamedTuple):
    """``restore(*tensors)`` is the dense tensor, or close to it. ``tensors`` are what autograd is to save."""

    restore: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, packed: Packed) -> Stored:
        """What is packed comes back by unpacking."""
        return cls(partial(_unpack, packed.layout), (packed.values, packed.positions, packed.scales))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """For a Function that takes ``restore, *stored``."""
        return self.restore, *self.tensors

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


class _Offer(NamedTuple):
    version: int
    stored: Stored


_offers: Any = WeakTensorKeyDictionary()  # entries die with their tensor


def offer(x: Tensor, stored: Stored | None) -> Tensor:
    """Have whoever reads ``x`` store nothing more than ``stored``, which another layer holds anyway. Returns ``x``."""
    # A compiler cannot tell whether x is changed in place later on.
    if stored is not None and not is_traced():
        _offers[x] = _Offer(x._version, stored)
    return x


def offered(x: Tensor) -> Stored | None:
    """What was offered for ``x``, or for the tensor that it is another view of; nothing if that was changed since."""
    if is_traced() or x.is_inference():
        return None
    base = x if x._base is None else x._base
    for source in (x, base):
        found: _Offer | None = _offers.get(source)
        if found is None or found.version != source._version:
            continue
        if source is x:
            return found.stored.cast(x.dtype)
        if x.numel() == source.numel() and is_dense_in_memory(x) and is_dense_in_memory(source):
            return found.stored.then(partial(_seen_as, layout_of(source), layout_of(x)))
    return None


def _seen_as(source: Layout, layout: Layout, dense: Tensor) -> Tensor:
    """The same elements, in the same order in memory, under another shape."""
    return unflatten(dense.permute(source.order).reshape(-1).to(layout.dtype), layout)
