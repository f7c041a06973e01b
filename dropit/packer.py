"""Packer: packs each input once, however many layers read it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dropit.packed import Packed, keep_dense
from dropit.strategies import Strategy


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    packed: Packed


class Packer:
    """A strategy, and what it made of the tensors that are alive.

    The layers of a model share one. Queries, keys and values projected from one tensor, or a residual block's first
    convolution and its shortcut, then save one packed copy of it. A tensor that was changed in place since is another.
    """

    def __init__(self, strategy: Strategy, value_dtype: torch.dtype | None = None) -> None:
        self.strategy = strategy
        self.value_dtype = value_dtype  # what values are stored in where it is narrower than theirs
        self._known: Any = WeakTensorKeyDictionary()  # entries die with their tensor

    def pack(self, x: Tensor, source: Tensor, *, channel_dim: int = -1, batch_dim: int = 0) -> Packed:
        """Pack ``x``, which is ``source`` or what autocast made of it."""
        if torch.compiler.is_compiling() or source.is_inference():
            return self._pack(x, channel_dim, batch_dim)  # a compiler merges equal computations by itself
        if _is_mapped(x):
            return keep_dense(x)
        # Within a backward pass, where checkpointing runs a forward anew, all is packed anew: the same random numbers
        # are to be drawn as before.
        backward = torch._C._current_graph_task_id()
        key = (source._version, x.dtype, channel_dim % x.dim(), batch_dim, backward)
        entry: _Entry | None = self._known.get(source)
        if entry is None or entry.key != key:
            entry = _Entry(key, self._pack(x, channel_dim, batch_dim))
            self._known[source] = entry
        return entry.packed

    def _pack(self, x: Tensor, channel_dim: int, batch_dim: int) -> Packed:
        return self.strategy.pack(x, channel_dim=channel_dim, batch_dim=batch_dim, value_dtype=self.value_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "value_dtype": self.value_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return repr(self.strategy) + (f", values in {self.value_dtype}" if self.value_dtype else "")


def _is_mapped(x: Tensor) -> bool:
    """Whether ``x`` is one of many under torch.func.vmap, where no shape may depend on the values."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)
