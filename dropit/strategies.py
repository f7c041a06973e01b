"""What to keep of a layer's input: one frozen dataclass for each strategy.

Every strategy keeps ``max(1, round(n * (1 - gamma)))`` of n elements, exactly. Elements are numbered in memory order.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import Packed, dense_nbytes, flatten, keep_dense, packed_nbytes

_PACKABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Strategy(ABC):
    """Base of the strategies. ``gamma`` in [0, 1) is the fraction of the elements that is dropped."""

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)):
            raise TypeError(f"gamma must be a number, got {self.gamma!r}")
        if not 0 <= self.gamma < 1:  # NaN fails too
            raise ValueError(f"gamma must be in [0, 1), got {self.gamma}")

    def pack(self, x: Tensor) -> Packed:
        """Pack ``x``, or keep it dense where packing would not take fewer bytes (gamma 0, tiny tensors, integers)."""
        n = x.numel()
        if n == 0 or x.dtype not in _PACKABLE or x.layout is not torch.strided:
            return keep_dense(x)
        if packed_nbytes(n, self.count(n), x.element_size()) >= dense_nbytes(x):
            return keep_dense(x)
        with torch.no_grad():
            flat, layout = flatten(x.detach())
            return ops.pack(flat, self.select(flat), self.count(n), layout)

    def count(self, n: int) -> int:
        """How many of ``n`` elements are kept: never none, rounded (not cut, so 1000 at gamma 0.9 gives 100)."""
        return _share(n, self.gamma)

    @abstractmethod
    def select(self, flat: Tensor) -> Tensor:
        """Mark what to keep of ``flat`` (n,): (n,) bool with exactly ``count(n)`` set."""


@dataclass(frozen=True)
class MinK(Strategy):
    """Drop the smallest by magnitude of the whole tensor: the paper's min-k."""

    def select(self, flat: Tensor) -> Tensor:
        """Mark the largest of all; of equal ones, the first."""
        return ops.topk_mask(ops.magnitude(flat).unsqueeze(0), self.count(flat.numel())).squeeze(0)


@dataclass(frozen=True)
class FastMinK(Strategy):
    """Drop the smallest by magnitude of each block of ``block_size`` elements, and of the shorter one at the end."""

    block_size: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int):
            raise TypeError(f"block_size must be an integer, got {self.block_size!r}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def count(self, n: int) -> int:
        """How many are kept: the share of each whole block and of the rest."""
        blocks, rest = divmod(n, self.block_size)
        kept = blocks * _share(self.block_size, self.gamma)
        return kept + _share(rest, self.gamma) if rest else kept

    def select(self, flat: Tensor) -> Tensor:
        """Mark the largest of each block; of equal ones, the first."""
        score = ops.magnitude(flat)
        whole = flat.numel() // self.block_size * self.block_size
        parts = []
        if whole:
            blocks = score[:whole].view(-1, self.block_size)
            parts.append(ops.topk_mask(blocks, _share(self.block_size, self.gamma)).view(-1))
        if whole < flat.numel():
            rest = score[whole:].unsqueeze(0)
            parts.append(ops.topk_mask(rest, _share(rest.numel(), self.gamma)).view(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Random(Strategy):
    """Drop at random, without replacement.

    Draws from PyTorch's generator of the tensor's device, or, where ``seed`` is given, from one of its own.
    """

    seed: int | None = None
    _generators: dict[torch.device, torch.Generator] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def select(self, flat: Tensor) -> Tensor:
        """Mark the elements that draw the largest numbers."""
        generator = self._generator(flat.device)
        draw = torch.randint(2**31 - 1, (1, flat.numel()), dtype=torch.int32, device=flat.device, generator=generator)
        return ops.topk_mask(draw, self.count(flat.numel())).squeeze(0)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None:
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def __getstate__(self) -> dict[str, object]:
        # Generators cannot be copied everywhere; a copy starts again from the seed.
        return {**self.__dict__, "_generators": {}}


STRATEGIES: dict[str, type[Strategy]] = {"fastmink": FastMinK, "mink": MinK, "random": Random}


def make_strategy(name: str, gamma: float = 0.9, *, block_size: int | None = None, seed: int | None = None) -> Strategy:
    """The strategy called ``name``; ``block_size`` and ``seed`` only for one that has them.

    Raises ValueError for an unknown name, an argument that the strategy does not take, or a value out of range.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    options = {key: value for key, value in (("block_size", block_size), ("seed", seed)) if value is not None}
    unknown = options.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"strategy {name!r} takes no {' or '.join(sorted(unknown))}")
    return kind(gamma=gamma, **options)  # type: ignore[arg-type]


def _share(n: int, gamma: float) -> int:
    return max(1, round(n * (1 - gamma)))
