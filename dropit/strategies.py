"""What to keep of a layer's input: one frozen dataclass for each strategy.

Every strategy keeps ``max(1, round(n * (1 - gamma)))`` of n, exactly. Elements are numbered in memory order.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import (
    OFFSET_BLOCK,
    Layout,
    Packed,
    channels_nbytes,
    dense_nbytes,
    flatten,
    keep_dense,
    memory_order,
    narrower,
    packed_nbytes,
)

_ONE_BLOCK = 16384  # elements
_PACKABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Strategy(ABC):
    """Base of the strategies. ``gamma`` in [0, 1) is the fraction that is dropped."""

    gamma: float = 0.9
    # The same, written out. A compiler takes a number that is another one in the next model for a variable, which no
    # count of elements can be computed from; a text is always a constant, and guarded as such.
    _gamma: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)):
            raise TypeError(f"gamma must be a number, got {self.gamma!r}")
        if not 0 <= self.gamma < 1:  # NaN fails too
            raise ValueError(f"gamma must be in [0, 1), got {self.gamma}")
        object.__setattr__(self, "_gamma", repr(float(self.gamma)))

    @abstractmethod
    def pack(
        self, x: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, value_dtype: torch.dtype | None = None
    ) -> Packed:
        """Pack ``x``, or keep it dense where that takes no more bytes (gamma 0, tiny tensors, integers).

        ``value_dtype``: what to store values in where it is narrower than the tensor's dtype.
        """

    @abstractmethod
    def nbytes(self, x: Tensor, channel_dim: int, batch_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes that ``x`` takes when packed with values in ``dtype``."""

    def stays_dense(self, x: Tensor, channel_dim: int, batch_dim: int, value_dtype: torch.dtype | None) -> bool:
        """Whether packing ``x`` would save nothing, or cannot be done."""
        if x.numel() == 0 or x.dtype not in _PACKABLE or x.layout is not torch.strided:
            return True
        return self.nbytes(x, channel_dim % x.dim(), batch_dim, narrower(x.dtype, value_dtype)) >= dense_nbytes(x)

    def _share(self, n: int) -> int:
        """Return how many of n are kept: never none, rounded (not cut, so 1000 at gamma 0.9 gives 100)."""
        return max(1, round(n * (1 - float(self._gamma or self.gamma))))


@dataclass(frozen=True)
class ElementStrategy(Strategy):
    """Keeps single elements: of the whole tensor or, ``per_sample``, of each sample as many as of the others."""

    per_sample: bool = False

    def pack(
        self, x: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, value_dtype: torch.dtype | None = None
    ) -> Packed:
        """Pack ``x``, or keep it dense where that takes no more bytes."""
        if self.stays_dense(x, channel_dim, batch_dim, value_dtype):
            return keep_dense(x)
        with torch.no_grad():
            samples, total = self._samples(x, batch_dim), self._total(x, batch_dim)
            flat, layout = flatten(x.detach(), outermost=batch_dim if samples > 1 else None)
            blocks = self._blocks(x.numel() // samples, samples)
            if blocks is not None:
                layout = layout._replace(per_block=self._per_block(x, batch_dim))
                return ops.backend(flat).pack_largest(flat, *blocks, layout, value_dtype)  # type: ignore[no-any-return]
            mask = self.select(flat.view(samples, -1)).view(-1) if total < x.numel() else None
            return ops.pack(flat, mask, total, layout, value_dtype)

    def nbytes(self, x: Tensor, channel_dim: int, batch_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of values and positions."""
        return packed_nbytes(x.numel(), self._total(x, batch_dim), dtype, self._per_block(x, batch_dim))

    def count(self, n: int) -> int:
        """How many of ``n`` elements are kept."""
        return self._share(n)

    @abstractmethod
    def select(self, rows: Tensor) -> Tensor:
        """Mark what to keep of each row (r, n): bool of the same shape with exactly ``count(n)`` set in each."""

    def _blocks(self, n: int, samples: int) -> tuple[int, int, int] | None:
        """Return the block size, and how many are kept of each block and of the rest, of samples of n elements.

        None where :meth:`select` is to mark what is kept.
        """
        return None

    def _per_block(self, x: Tensor, batch_dim: int) -> int | None:
        """Return how many are kept of each block of OFFSET_BLOCK elements, where that is known beforehand."""
        return None

    def _samples(self, x: Tensor, batch_dim: int) -> int:
        return x.shape[batch_dim] if self.per_sample and x.dim() > 1 else 1

    def _total(self, x: Tensor, batch_dim: int) -> int:
        samples = self._samples(x, batch_dim)
        return samples * self.count(x.numel() // samples)


@dataclass(frozen=True)
class MinK(ElementStrategy):
    """Drop the smallest by magnitude of the whole tensor: the paper's min-k."""

    def select(self, rows: Tensor) -> Tensor:
        """Mark the largest of all; of equal ones, the first."""
        return ops.largest_mask(rows, rows.shape[1], self.count(rows.shape[1]), 0)

    def _blocks(self, n: int, samples: int) -> tuple[int, int, int] | None:
        return (n, self.count(n), 0) if samples == 1 else None


@dataclass(frozen=True)
class FastMinK(ElementStrategy):
    """Drop the smallest by magnitude of each block of ``block_size`` elements, and of the shorter one at the end.

    None: blocks of 256, which are the fastest, and as good as longer ones; a tensor of up to 16,384 elements is one.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is None:
            return
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int):
            raise TypeError(f"block_size must be an integer, got {self.block_size!r}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def count(self, n: int) -> int:
        """How many are kept: the share of each whole block and of the rest."""
        size, share, rest = self._form(n)
        return n // size * share + rest

    def select(self, rows: Tensor) -> Tensor:
        """Mark the largest of each block; of equal ones, the first."""
        return ops.largest_mask(rows, *self._form(rows.shape[1]))

    def _blocks(self, n: int, samples: int) -> tuple[int, int, int] | None:
        size, share, rest = self._form(n)
        return None if samples > 1 and rest else (size, share, rest)  # each sample has a rest

    def _per_block(self, x: Tensor, batch_dim: int) -> int | None:
        samples = self._samples(x, batch_dim)
        size, share, rest = self._form(x.numel() // samples)
        return share if size == OFFSET_BLOCK and not (samples > 1 and rest) else None

    def _form(self, n: int) -> tuple[int, int, int]:
        """Return the block size, and how many are kept of each whole block and of what is left of ``n``."""
        size = self.block_size or (OFFSET_BLOCK if n > _ONE_BLOCK else n)
        rest = n % size
        # No branch: where n is a variable, a compiler would need a graph for each of the two cases.
        return size, self._share(size), min(rest, self._share(rest))


@dataclass(frozen=True)
class RandomSource:
    """Random numbers from PyTorch's generator of the device, or, where ``seed`` is given, from a separate one.

    Compiled, they are PyTorch's in any case.
    """

    seed: int | None = None
    _generators: dict[torch.device, torch.Generator] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def integers(self, rows: int, n: int, device: torch.device) -> Tensor:
        """(rows, n) int32, from 0 to 2^31 - 2."""
        generator = self._generator(device)
        if generator is None:  # which may not be given, not even as None, where a compiler does not know n
            return torch.randint(2**31 - 1, (rows, n), dtype=torch.int32, device=device)
        return torch.randint(2**31 - 1, (rows, n), dtype=torch.int32, device=device, generator=generator)

    def uniform(self, like: Tensor) -> Tensor:
        """In [0, 1), of the shape and dtype of ``like``."""
        return torch.empty_like(like).uniform_(generator=self._generator(like.device))

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.seed is None or device.type == "meta" or torch.compiler.is_compiling():
            return None  # a graph has no place for generators of one's own
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def __getstate__(self) -> dict[str, object]:
        # Generators cannot be copied everywhere; a copy starts again from the seed.
        return {**self.__dict__, "_generators": {}}


@dataclass(frozen=True)
class Random(RandomSource, ElementStrategy):
    """Drop elements at random, without replacement."""

    def select(self, rows: Tensor) -> Tensor:
        """Mark the elements that draw the largest numbers."""
        return ops.topk_mask(self.integers(rows.shape[0], rows.shape[1], rows.device), self.count(rows.shape[1]))


@dataclass(frozen=True)
class ChannelStrategy(Strategy):
    """Keeps whole channels: dim 1 of a convolution's input, the last of a Linear's."""

    def pack(
        self, x: Tensor, *, channel_dim: int = -1, batch_dim: int = 0, value_dtype: torch.dtype | None = None
    ) -> Packed:
        """Pack ``x``, or keep it dense where that takes no more bytes."""
        if self.stays_dense(x, channel_dim, batch_dim, value_dtype):
            return keep_dense(x)
        x, channel_dim = x.detach(), channel_dim % x.dim()
        with torch.no_grad():
            count = self._share(x.shape[channel_dim])
            mask = ops.topk_mask(self.score(x, channel_dim).unsqueeze(0), count).squeeze(0)
            layout = Layout(x.shape, x.dtype, memory_order(x), channel_dim)
            return ops.pack_channels(x, mask, count, layout, value_dtype)

    def nbytes(self, x: Tensor, channel_dim: int, batch_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of values and positions."""
        return channels_nbytes(x, channel_dim, self._share(x.shape[channel_dim]), dtype)

    @abstractmethod
    def score(self, x: Tensor, channel_dim: int) -> Tensor:
        """The channels' scores, (channels,) integers: the largest stay; of equal ones, the first."""


@dataclass(frozen=True)
class MinKChannels(ChannelStrategy):
    """Drop the channels of the smallest L2 norm."""

    def score(self, x: Tensor, channel_dim: int) -> Tensor:
        """The bits of the norms' squares, in float32: elements above 1e19 count as infinite, below 1e-23 as 0."""
        others = [dim for dim in range(x.dim()) if dim != channel_dim]
        squares = (x.float() if x.element_size() < 4 else x).square()
        return ops.magnitude(squares.sum(dim=others) if others else squares)


@dataclass(frozen=True)
class RandomChannels(RandomSource, ChannelStrategy):
    """Drop channels at random, without replacement."""

    def score(self, x: Tensor, channel_dim: int) -> Tensor:
        """Random numbers."""
        return self.integers(1, x.shape[channel_dim], x.device).squeeze(0)


STRATEGIES: dict[str, type[Strategy]] = {
    "fastmink": FastMinK,
    "mink": MinK,
    "random": Random,
    "mink_c": MinKChannels,
    "random_c": RandomChannels,
}


def make_strategy(
    name: str,
    gamma: float = 0.9,
    *,
    block_size: int | None = None,
    per_sample: bool | None = None,
    seed: int | None = None,
) -> Strategy:
    """The strategy called ``name``; the other arguments, where given, only for one that has them.

    Raises ValueError for an unknown name, an argument that the strategy does not take, or a value out of range.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    kind = STRATEGIES[name]
    given = {"block_size": block_size, "per_sample": per_sample, "seed": seed}
    options = {key: value for key, value in given.items() if value is not None}
    unknown = options.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"strategy {name!r} takes no {' or '.join(sorted(unknown))}")
    return kind(gamma=gamma, **options)  # type: ignore[arg-type]
