"""Random numbers that are a function of what they are for, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

# What a seed is for: no two purposes share one.
ORDER, SAMPLE, MIX = range(3)


def derive_seed(*parts: int) -> int:
    """Return a seed of 32 bits, a function of the parts and of nothing else."""
    # One is needed for every sample: a tenth of the time of NumPy's SeedSequence.
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


@contextmanager
def preserved_generator() -> Iterator[torch.Generator]:
    """Give torch's generator on the CPU, to be seeded at will, and restore its state afterwards."""
    # Not torch.manual_seed, which would seed the generators of the GPUs as well.
    state = torch.get_rng_state()
    try:
        yield torch.default_generator
    finally:
        torch.set_rng_state(state)
