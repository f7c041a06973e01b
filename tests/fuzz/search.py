"""Many seeds, in several processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tests.fuzz.oracle import Failure, judge

CHUNK = 50


def pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes of one thread each; not forks, which threads do not survive."""
    return ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))


def failures(seeds: range, processes: int) -> Iterator[list[Failure]]:
    """Those of each chunk of seeds, as they come."""
    chunks = [seeds[first : first + CHUNK] for first in range(0, len(seeds), CHUNK)]
    with pool(processes) as workers:
        yield from workers.map(judge_all, chunks)


def judge_all(seeds: range) -> list[Failure]:
    """The failures of some seeds."""
    return [failure for seed in seeds for failure in judge(seed)]
