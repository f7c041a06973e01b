"""Packer: how a model stores what its layers keep; packs each input once, however many layers read it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dropit import ops
from dropit.packed import Packed, flatten, keep_dense
from dropit.stored import Stored, offered
from dropit.strategies import Draws, Strategy
from dropit.tracing import is_mapped


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    packed: Packed


class Packer:
    """A strategy, and what it made of the tensors that are alive.

    The layers of a model share one. Queries, keys and values projected from one tensor, or a residual block's first
    convolution and its shortcut, then save one packed copy of it. A tensor that was changed in place since is another.

    ``value_dtype``: what packed values are stored in where it is narrower than theirs. ``bits``: 16, 8 or 4, what
    layers that drop nothing quantize their tensors to. ``stochastic``: whether these are rounded up or down at random,
    by how near they are, with numbers from PyTorch's generator or, where ``seed`` is given, from one of their own.
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
        self._draws = Draws(seed=seed)
        self._known: Any = WeakTensorKeyDictionary()  # entries die with their tensor

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        return self.stochastic or isinstance(self.strategy, Draws)

    def store(self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0) -> Stored:
        """What to keep of ``x``, which is ``source`` or what autocast made of it: packed, if it is not held anyway."""
        known = offered(source)
        if known is not None:
            return known if x is source else known.cast(x.dtype)
        return Stored.of(self.pack(x, source, channel_dim=channel_dim, batch_dim=batch_dim))

    def pack(self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0) -> Packed:
        """Pack ``x``, once as long as ``source`` lives."""
        if is_mapped(x):
            return keep_dense(x)
        if torch.compiler.is_compiling() or source.is_inference():
            return self._pack(x, channel_dim, batch_dim)  # a compiler merges equal computations by itself
        # Within a backward pass, where checkpointing runs a forward anew, all is packed anew: the same random numbers
        # are to be drawn as before.
        backward = torch._C._current_graph_task_id()
        key = (source._version, x.dtype, channel_dim % x.dim(), batch_dim, backward)
        entry: _Entry | None = self._known.get(source)
        if entry is None or entry.key != key:
            entry = _Entry(key, self._pack(x, channel_dim, batch_dim))
            self._known[source] = entry
        return entry.packed

    def store_all(self, x: Tensor) -> Stored:
        """All of ``x``, as :meth:`quantize` has it, if it is not held anyway."""
        return offered(x) or Stored.of(self.quantize(x))

    def quantize(self, x: Tensor) -> Packed:
        """All of ``x``, in ``bits`` bits an element with a scale for each 32, or as it is where that takes no more."""
        assert self.bits is not None
        if not self.narrows(x):
            return keep_dense(x)
        with torch.no_grad():
            flat, layout = flatten(x.detach())
            steps, scales = ops.quantize(flat, self.bits, self._noise(flat))
            return Packed(steps, None, scales, layout)

    def narrows(self, x: Tensor) -> bool:
        """Whether ``x`` takes less when quantized."""
        assert self.bits is not None
        return x.is_floating_point() and x.numel() * self.bits // 8 + 2 < x.nbytes

    def _noise(self, flat: Tensor) -> Tensor | None:
        return self._draws.uniform(flat) if self.stochastic else None

    def _pack(self, x: Tensor, channel_dim: int, batch_dim: int) -> Packed:
        return self.strategy.pack(x, channel_dim=channel_dim, batch_dim=batch_dim, value_dtype=self.value_dtype)

    def __getstate__(self) -> dict[str, Any]:
        options = {"value_dtype": self.value_dtype, "bits": self.bits, "stochastic": self.stochastic}
        return {"strategy": self.strategy, **options, "seed": self._draws.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def replaced(self, *, gamma: float, value_dtype: torch.dtype | None, bits: int | None) -> Packer:
        """A packer that differs from this one in these alone."""
        strategy = dataclasses.replace(self.strategy, gamma=gamma)
        return Packer(**self.__getstate__() | {"strategy": strategy, "value_dtype": value_dtype, "bits": bits})

    def __repr__(self) -> str:
        values = f", values in {self.value_dtype}" if self.value_dtype else ""
        rest = f", the rest in {self.bits} bits" if self.bits else ""
        return f"{self.strategy}{values}{rest}{' rounded stochastically' if self.bits and self.stochastic else ''}"
