"""Many seeds, in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from tests.fuzz.oracle import Failure, judge

CHUNK = 50


def pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes of one thread each; not forks, which threads do not survive."""
    return ProcessPoolExecutor(processes, get_context("spawn"), set_up)


def set_up() -> None:
    """One thread, and on a GPU the kernels that give the same results each time."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)


def failures(seeds: range, processes: int, device: str = "cpu") -> Iterator[list[Failure]]:
    """Those of each chunk of seeds, as they come."""
    chunks = [seeds[first : first + CHUNK] for first in range(0, len(seeds), CHUNK)]
    with pool(processes) as workers:
        yield from workers.map(partial(judge_all, device=device), chunks)


def judge_all(seeds: range, device: str = "cpu") -> list[Failure]:
    """The failures of some seeds."""
    return [failure for seed in seeds for failure in judge(seed, device)]
