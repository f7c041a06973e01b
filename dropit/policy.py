"""SavePolicy: what a layer does with the tensors that it saves for backward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import Packed, flatten, keep_dense
from dropit.strategies import RandomSource, Strategy
from dropit.tracing import saved_as_is


@dataclass(frozen=True)
class SavePolicy:
    """Which elements of its input a layer keeps, and in which form it saves them and all else.

    ``strategy``: which elements are kept. ``value_dtype``: what kept values are stored in, where it is narrower than
    theirs. ``bits``: 16, 8, 4 or 2, what all that nothing is dropped from is quantized to; None where it is saved as
    PyTorch does.
    ``stochastic``: whether codes of 4 bits or more are rounded up or down at random, by how near they are.

    ``seed``: of the random numbers for stochastic rounding; None for that of PyTorch's generator.
    """

    strategy: Strategy
    value_dtype: torch.dtype | None = None
    bits: int | None = None
    stochastic: bool = False
    seed: int | None = None

    @property
    def is_random(self) -> bool:
        """Whether random numbers decide what is saved."""
        return self.stochastic or isinstance(self.strategy, RandomSource)

    @property
    def own_seed(self) -> int | None:
        """The seed of the random numbers; None for that of PyTorch's generator."""
        return getattr(self.strategy, "seed", None) if self.seed is None else self.seed

    @property
    def input_bits(self) -> int | None:
        """The bits that an input is quantized to; None where the strategy packs it."""
        return None if self.strategy.gamma else self.bits

    def narrows(self, x: Tensor) -> bool:
        """Whether ``x`` takes fewer bytes when quantized."""
        assert self.bits is not None
        return narrows(x, self.bits)

    def replaced(self, *, gamma: float, value_dtype: torch.dtype | None, bits: int | None) -> SavePolicy:
        """Return a policy that differs from this one in these alone."""
        strategy = dataclasses.replace(self.strategy, gamma=gamma)
        return dataclasses.replace(self, strategy=strategy, value_dtype=value_dtype, bits=bits)

    def __repr__(self) -> str:
        values = f", values in {self.value_dtype}" if self.value_dtype else ""
        rest = f", the rest in {self.bits} bits" if self.bits else ""
        return f"{self.strategy}{values}{rest}{' rounded stochastically' if self.bits and self.stochastic else ''}"


def narrows(x: Tensor, bits: int) -> bool:
    """Whether ``x`` takes fewer bytes when quantized to so many bits."""
    return x.is_floating_point() and x.numel() * bits // 8 + 2 < x.numel() * x.element_size()


def quantize(
    x: Tensor, bits: int, noise: RandomSource | None = None, statistics: ops.Statistics | None = None
) -> Packed:
    """Quantize all of ``x`` to ``bits`` bits with a scale for each 32 elements, or keep it dense if that takes no more.

    ``noise``: to round stochastically. ``statistics``: quantize ``x`` after :func:`dropit.ops.reference.normalize`.
    """
    if not narrows(x, bits):
        return keep_dense(x)
    flat, layout = flatten(x.detach())
    codes, scales = ops.quantize(flat, bits, None if noise is None else noise.uniform(flat), statistics)
    return Packed(saved_as_is(codes), None, scales, layout)
