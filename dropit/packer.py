"""Packer: how a layer stores what it keeps; an input is packed once for all the layers of a model that read it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dropit import ops
from dropit.packed import Packed, flatten, keep_dense
from dropit.snapshot import Snapshot, graph_task, place
from dropit.stored import Offered, Stored, offered
from dropit.strategies import RandomSource, Strategy
from dropit.tracing import is_mapped, is_traced, saved_as_is


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    packed: Packed
    snapshot: Snapshot
    readers: set[tuple[str, str]]  # which have it: layer and role

    def is_for(self, source: Tensor, key: tuple[Any, ...]) -> bool:
        """Whether it is what would be made of ``source`` now."""
        return self.key == key and self.snapshot.scope.is_current() and self.snapshot.matches(source)


class _Shared:
    """What the packers of a model's layers have in common: packed copies of the tensors that are alive."""

    def __init__(self) -> None:
        self.known: Any = WeakTensorKeyDictionary()  # entries die with their tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, ()


_CALLS = 64  # remembered


class _Calls:
    """Of the latest calls of a layer in forward passes, by the input that was read: what was offered for it, in bits.

    Activation checkpointing runs a forward pass again within the backward pass, where what was offered for the inputs
    of a checkpointed region is not known, nor always their tensors; their storages are the same, unless they have been
    moved (``save_on_cpu``). What is made within a region has a new storage and is offered anew.
    """

    def __init__(self) -> None:
        self.offered: dict[Any, int | None] = {}

    def note(self, source: Tensor, bits: int | None) -> None:
        """Remember what was offered for ``source``."""
        key = place(source)
        self.offered.pop(key, None)  # the latest comes last
        self.offered[key] = bits
        if len(self.offered) > _CALLS:
            del self.offered[next(iter(self.offered))]

    def recall(self, source: Tensor) -> int | None:
        """What was offered for ``source``; for one never seen, what was offered in all calls alike."""
        known = set(self.offered.values())
        return self.offered.get(place(source), known.pop() if len(known) == 1 else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Calls, ()


class Packer:
    """A strategy, and all else that says how a layer stores what it keeps.

    Each layer of a model has a packer of its own, made by :meth:`for_layer`. Queries, keys and values projected from
    one tensor, or a residual block's first convolution and its shortcut, save one packed copy of it between them: it is
    given to each reader once, as long as the tensor is unchanged, and to none in another scope (:class:`Scope`).

    ``value_dtype``: what packed values are stored in where it is narrower than theirs. ``bits``: 16, 8 or 4, what
    layers that drop nothing quantize their tensors to. ``stochastic``: whether these are rounded up or down at random,
    by how near they are.

    Random numbers, where any are drawn, are a function of ``seed`` (where it is None, of that of PyTorch's generator),
    the layer and how often it has drawn. They leave PyTorch's generators alone, and are the same when activation
    checkpointing runs a forward pass again.
    """

    def __init__(
        self,
        strategy: Strategy,
        value_dtype: torch.dtype | None = None,
        *,
        bits: int | None = None,
        stochastic: bool = False,
        seed: int | None = None,
    ) -> None:
        self.strategy = strategy
        self.value_dtype = value_dtype
        self.bits = bits
        self.stochastic = stochastic
        self.seed = seed
        self._shared = _Shared()
        self._layer = ""
        self._drawn: dict[str, int] = {}  # how often, by role
        self._skipped = 0  # forward passes without gradients
        self._calls: dict[str, _Calls] = {}  # by role

    def for_layer(self, fqn: str) -> Packer:
        """A packer like this one for the layer of that name."""
        other = copy.copy(self)
        other._layer, other._drawn, other._skipped, other._calls = fqn, {}, 0, {}
        return other

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        return self.stochastic or isinstance(self.strategy, RandomSource)

    def skip(self, inputs: dict[str, Tensor]) -> None:
        """Take note of the inputs, by role, of a forward pass in training without gradients.

        It may be a checkpointed region's first run; the second one, in the backward pass, stores accordingly.
        """
        if not is_traced() and graph_task() == -1:
            self._skipped += 1
            for role, input in inputs.items():
                self._look_up(input, role)

    def store(
        self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, role: str = "input"
    ) -> Stored | None:
        """What to save of ``x``, which is ``source`` or what autocast made of it; None for ``x`` as it is.

        ``role`` tells apart the inputs of a layer that has several.
        """
        known = self._look_up(source, role)
        if known is None:
            packed = self.pack(x, source, channel_dim=channel_dim, batch_dim=batch_dim, role=role)
        elif known.stored is not None:
            return known.stored if x is source else known.stored.cast(x.dtype)
        else:
            packed = self._once(source, (x.dtype, known.bits), role, lambda: self._quantize(x, known.bits, role))
        return None if packed.is_dense else Stored.of(packed)

    def _look_up(self, source: Tensor, role: str) -> Offered | None:
        """What is on offer for ``source``; within a backward pass, where less is known, at least whether there was."""
        if is_traced():
            return None
        known = offered(source)
        calls = self._calls.setdefault(role, _Calls())
        if graph_task() == -1:
            calls.note(source, None if known is None else known.bits)
        elif known is None:
            bits = calls.recall(source)
            return None if bits is None else Offered(None, bits)
        return known

    def pack(
        self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, role: str = "input"
    ) -> Packed:
        """Pack ``x``, once for all readers of ``source``."""
        if is_mapped(x):
            return keep_dense(x)
        key = (x.dtype, channel_dim % max(x.dim(), 1), batch_dim, self.strategy, self.value_dtype)
        return self._once(source, key, role, lambda: self._pack(x, channel_dim, batch_dim, role))

    def _once(self, source: Tensor, key: tuple[Any, ...], role: str, pack: Callable[[], Packed]) -> Packed:
        """What ``pack`` makes of ``source``, or made for another reader."""
        # A compiler merges equal computations by itself, and a parameter may not be known by a weak reference.
        if is_traced() or source.is_inference() or isinstance(source, nn.Parameter):
            return pack()
        known, reader = self._shared.known, (self._layer, role)
        entry: _Entry | None = known.get(source)
        if entry is None or reader in entry.readers or not entry.is_for(source, key):
            packed = pack()
            if packed.is_dense:
                return packed
            known[source] = entry = _Entry(key, packed, Snapshot.of(source), set())
        entry.readers.add(reader)
        return entry.packed

    def store_all(self, x: Tensor, role: str = "input") -> Stored:
        """All of ``x``, as :meth:`quantize` has it, if it is not held anyway."""
        known = self._look_up(x, role)
        if known is not None and known.stored is not None:
            return known.stored
        return Stored.of(self.quantize(x, role))

    def quantize(self, x: Tensor, role: str = "input") -> Packed:
        """All of ``x``, in ``bits`` bits an element with a scale for each 32, or as it is where that takes no more."""
        assert self.bits is not None
        return self._quantize(x, self.bits, role)

    def quantize_normalized(self, x: Tensor, statistics: ops.Statistics) -> Packed:
        """The same of ``x``, dense in memory and narrowed by it, after :func:`dropit.ops.reference.normalize`."""
        assert self.bits is not None
        return self._quantize(x, self.bits, "normalized", statistics)

    def _quantize(self, x: Tensor, bits: int, role: str, statistics: ops.Statistics | None = None) -> Packed:
        if not _narrows(x, bits):
            return keep_dense(x)
        with torch.no_grad():
            flat, layout = flatten(x.detach())
            steps, scales = ops.quantize(flat, bits, self._noise(flat, role), statistics)
            return Packed(saved_as_is(steps), None, scales, layout)

    def narrows(self, x: Tensor) -> bool:
        """Whether ``x`` takes less when quantized."""
        assert self.bits is not None
        return _narrows(x, self.bits)

    def offer(self, stored: Stored | None) -> Offered:
        """What this layer stores, to be offered to others; None where it stores nothing in this pass."""
        assert self.bits is not None
        return Offered(stored, self.bits)

    def _noise(self, flat: Tensor, role: str) -> Tensor | None:
        if not self.stochastic:
            return None
        return RandomSource(self._next_seed(role)).uniform(flat)

    def _pack(self, x: Tensor, channel_dim: int, batch_dim: int, role: str) -> Packed:
        strategy = self.strategy
        if isinstance(strategy, RandomSource) and not torch.compiler.is_compiling():
            strategy = dataclasses.replace(strategy, seed=self._next_seed(role))  # type: ignore[call-arg]
        packed = strategy.pack(x, channel_dim=channel_dim, batch_dim=batch_dim, value_dtype=self.value_dtype)
        narrowed = packed.values.dtype != x.dtype
        return packed._replace(values=saved_as_is(packed.values)) if narrowed else packed

    def _next_seed(self, role: str) -> int | None:
        """The seed for what is drawn next; within a backward pass, for what was drawn last in the forward pass."""
        if torch.compiler.is_compiling():
            return None  # as compiled dropout, from PyTorch's generator
        if graph_task() == -1:
            self._drawn[role] = self._drawn.get(role, 0) + 1
        seed = getattr(self.strategy, "seed", None) if self.seed is None else self.seed
        count = self._drawn.get(role, 0) + self._skipped
        parts = (torch.initial_seed() if seed is None else seed, self._layer, role, count)
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")

    def drawn(self) -> tuple[dict[str, int], int]:
        """How often has been drawn, by role and by all together, so that another run can go on by :meth:`draw_on`."""
        return (dict(self._drawn), self._skipped) if self.draws else ({}, 0)

    def draw_on(self, drawn: dict[str, int], skipped: int) -> None:
        """Go on after as many draws."""
        self._drawn, self._skipped = dict(drawn), skipped

    def replaced(self, *, gamma: float, value_dtype: torch.dtype | None, bits: int | None) -> Packer:
        """A packer that differs from this one in these alone, and shares what is packed with it."""
        other = copy.copy(self)
        other.strategy = dataclasses.replace(self.strategy, gamma=gamma)
        other.value_dtype, other.bits = value_dtype, bits
        return other

    def __repr__(self) -> str:
        values = f", values in {self.value_dtype}" if self.value_dtype else ""
        rest = f", the rest in {self.bits} bits" if self.bits else ""
        return f"{self.strategy}{values}{rest}{' rounded stochastically' if self.bits and self.stochastic else ''}"


def _narrows(x: Tensor, bits: int) -> bool:
    return x.is_floating_point() and x.numel() * bits // 8 + 2 < x.numel() * x.element_size()
