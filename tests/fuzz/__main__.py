"""Try many seeds, and print those that fail."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.fuzz.oracle import judge
from tests.fuzz.search import CHUNK, failures
from tests.fuzz.training import random_case


def main() -> int:
    """Print the failures and the progress. Returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="how many seeds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", type=int, metavar="SEED", help="print the case of a seed, and judge it")
    given = parser.parse_args()
    if given.show is not None:
        return show(given.show)
    start, done, failed = time.monotonic(), 0, 0
    for found in failures(range(given.first, given.first + given.count), given.processes):
        done, failed = min(done + CHUNK, given.count), failed + len({failure.seed for failure in found})
        for failure in found:
            print(failure, flush=True)
        if done % 1000 == 0 or done == given.count:
            print(f"{done} seeds, {failed} fail, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return int(failed > 0)


def show(seed: int) -> int:
    """Print the case of a seed and its failures. Returns 1 if there are any."""
    torch.set_num_threads(1)
    found = judge(seed)
    print(random_case(seed), *found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
