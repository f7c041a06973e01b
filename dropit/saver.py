"""Saver: saves the tensors of one layer as its policy says, and shares them with the other layers of its model."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import Packed
from dropit.policy import SavePolicy, narrows, quantize
from dropit.rematerialize import Memo, Published
from dropit.saved import Saved
from dropit.snapshot import graph_task, place
from dropit.strategies import RandomSource, Strategy
from dropit.tracing import is_mapped, is_traced, saved_as_is

_CALLS = 64  # remembered


class _Calls:
    """Of the latest calls of a layer in forward passes, by the input that was read: the bits it was published in.

    Activation checkpointing runs a forward pass again within the backward pass, where what was published for the inputs
    of a checkpointed region is not known, nor always their tensors; their storages are the same, unless they have been
    moved (``save_on_cpu``). What is computed within a region has a new storage, and is published again.
    """

    def __init__(self) -> None:
        self._bits: dict[Any, int | None] = {}

    def note(self, source: Tensor, bits: int | None) -> None:
        """Remember in how many bits ``source`` was published."""
        key = place(source)
        self._bits.pop(key, None)  # the latest comes last
        self._bits[key] = bits
        if len(self._bits) > _CALLS:
            del self._bits[next(iter(self._bits))]

    def recall(self, source: Tensor) -> int | None:
        """Return what was noted for ``source``; for one never seen, what was noted alike in all calls."""
        known = set(self._bits.values())
        return self._bits.get(place(source), known.pop() if len(known) == 1 else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Calls, ()


class Saver:
    """Saves a layer's tensors for backward as ``policy`` says. ``memo``: what the layers of its model share.

    Random numbers, where the policy needs any, are a function of its seed, the layer's name and how often the layer has
    drawn some. They do not touch PyTorch's generators, and are the same when activation checkpointing runs a forward
    pass again.
    """

    def __init__(self, policy: SavePolicy, memo: Memo | None = None, layer: str = "") -> None:
        self.policy = policy
        self.memo = Memo() if memo is None else memo
        self._layer = layer
        self._drawn: dict[str, int] = {}  # how often, by role
        self._skipped = 0  # forward passes without gradients
        self._calls: dict[str, _Calls] = {}  # by role

    @property
    def bits(self) -> int | None:
        """The bits that the policy quantizes to."""
        return self.policy.bits

    def save(
        self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, role: str = "input"
    ) -> Saved | None:
        """Return what to save of ``x``, which is ``source`` or what autocast made of it; None for ``x`` as it is.

        What another layer saves gives it back, if it does (:mod:`dropit.rematerialize`); else it is packed by the
        strategy or, if that drops nothing, quantized. ``role`` tells apart the inputs of a layer that has several.
        """
        published, policy = self._published(source, role), self.policy
        if published is not None and published.saved is not None:
            return published.saved if x is source else published.saved.cast(x.dtype)
        if published is None and is_mapped(x):
            return None
        form = (channel_dim % max(x.dim(), 1), batch_dim, policy.strategy, policy.value_dtype)
        bits = policy.input_bits if published is None else published.bits
        key = (x.dtype, *(form if bits is None else (bits,)))
        packed = self.memo.packed(source, key, (self._layer, role))
        if packed is None:
            if bits is not None:
                packed = self._quantize(x, bits, role)
            else:
                packed = self._strategy(role).pack(
                    x, channel_dim=channel_dim, batch_dim=batch_dim, value_dtype=policy.value_dtype
                )
                if packed.values.dtype != x.dtype:
                    packed = packed._replace(values=saved_as_is(packed.values))
            self.memo.share(source, key, (self._layer, role), packed)
        return None if packed.is_dense else Saved.of(packed)

    def save_whole(self, x: Tensor, role: str = "input") -> Saved:
        """Return what to save of ``x`` to have all elements back: what another layer saves, or its codes."""
        published = self._published(x, role)
        if published is not None and published.saved is not None:
            return published.saved
        assert self.bits is not None
        bits = self.bits if published is None else published.bits
        key = (x.dtype, bits)
        packed = self.memo.packed(x, key, (self._layer, role))
        if packed is None:
            packed = self._quantize(x, bits, role)
            self.memo.share(x, key, (self._layer, role), packed)
        return Saved.of(packed)

    def restorable(self, weight: Tensor, dtype: torch.dtype) -> Saved | None:
        """Return what gives ``weight`` back exactly, in ``dtype``, where it is computed from parameters; else None."""
        published = None if is_traced() or weight.is_leaf else self.memo.published(weight)
        return published.saved.cast(dtype) if published is not None and published.saved is not None else None

    def quantize(self, x: Tensor, role: str = "input", statistics: ops.Statistics | None = None) -> Packed:
        """Quantize all of ``x`` to the policy's bits: :func:`dropit.policy.quantize`."""
        assert self.bits is not None
        return self._quantize(x, self.bits, role, statistics)

    def publish(self, x: Tensor, saved: Saved | None) -> Tensor:
        """Publish for ``x`` what this layer saves; None where it saves nothing in this pass. Returns ``x``."""
        assert self.bits is not None
        return self.memo.publish(x, Published(saved, self.bits))

    def note_unsaved(self, inputs: dict[str, Tensor]) -> None:
        """Note the inputs, by role, of a forward pass in training without gradients.

        It may be the first run of a checkpointed region, whose second run has to save accordingly.
        """
        if not is_traced() and graph_task() == -1:
            self._skipped += 1
            for role, input in inputs.items():
                self._published(input, role)

    def drawn(self) -> tuple[dict[str, int], int]:
        """Return how often random numbers were drawn, by role and by all together, for :meth:`continue_after`."""
        return (dict(self._drawn), self._skipped) if self.policy.is_random else ({}, 0)

    def continue_after(self, drawn: dict[str, int], skipped: int) -> None:
        """Draw the random numbers that come after so many draws."""
        self._drawn, self._skipped = dict(drawn), skipped

    def _published(self, source: Tensor, role: str) -> Published | None:
        """Return what was published for ``source``; within a backward pass at least whether something was."""
        if is_traced():
            return self.memo.published(source)
        published = self.memo.published(source)
        calls = self._calls.setdefault(role, _Calls())
        if graph_task() == -1:
            calls.note(source, None if published is None else published.bits)
        elif published is None:
            bits = calls.recall(source)
            return None if bits is None else Published(None, bits)
        return published

    def _strategy(self, role: str) -> Strategy:
        strategy = self.policy.strategy
        if not isinstance(strategy, RandomSource) or torch.compiler.is_compiling():
            return strategy
        return dataclasses.replace(strategy, seed=self._next_seed(role))  # type: ignore[call-arg]

    def _quantize(self, x: Tensor, bits: int, role: str, statistics: ops.Statistics | None = None) -> Packed:
        random = self.policy.stochastic and bits > 2 and narrows(x, bits)
        noise = RandomSource(self._next_seed(role)) if random else None
        return quantize(x, bits, noise, statistics)

    def _next_seed(self, role: str) -> int | None:
        """Return the seed of the next draw; within a backward pass, of the last one in the forward pass."""
        if torch.compiler.is_compiling():
            return None  # as compiled dropout, from PyTorch's generator
        if graph_task() == -1:
            self._drawn[role] = self._drawn.get(role, 0) + 1
        seed, count = self.policy.own_seed, self._drawn.get(role, 0) + self._skipped
        parts = (torch.initial_seed() if seed is None else seed, self._layer, role, count)
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")

    def __repr__(self) -> str:
        return repr(self.policy)
