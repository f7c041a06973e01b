"""Try many seeds, and print those that fail."""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.oracle import judge
from tests.fuzz.search import CHUNK, failures, set_up
from tests.fuzz.training import random_case


def main() -> int:
    """Print the failures and the progress. Returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="how many seeds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", type=int, metavar="SEED", help="print the case of a seed, and judge it")
    parser.add_argument("--device", default="cpu", help="where the networks are trained (default: cpu)")
    given = parser.parse_args()
    if given.show is not None:
        return show(given.show, given.device)
    start, done, failed = time.monotonic(), 0, 0
    for found in failures(range(given.first, given.first + given.count), given.processes, given.device):
        done, failed = min(done + CHUNK, given.count), failed + len({failure.seed for failure in found})
        for failure in found:
            print(failure, flush=True)
        if done % 1000 == 0 or done == given.count:
            print(f"{done} seeds, {failed} fail, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return int(failed > 0)


def show(seed: int, device: str) -> int:
    """Print the case of a seed and its failures. Returns 1 if there are any."""
    set_up()
    found = judge(seed, device)
    print(random_case(seed, device), *found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
