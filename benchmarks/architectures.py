"""What the architectures of zoo.py save for backward, plain and with DropIT, and how far off the gradients are.

    python benchmarks/architectures.py [--models resnet18 ...] [--quick] [--output DIRECTORY]

In each cell of bytes the change from plain. Errors are relative, of the weights' gradients that are matrices or
kernels, with the first weights: of the median weight and the worst; a gradient that all but vanishes, as below a
millionth of the largest, is measured against that. The time is of forward and backward, of a pair of steps that take
turns. Inputs are small and weights random, with those that begin at zero: the ratios are what matters.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch
from tasks import without_noise, without_zeros
from torch import Tensor, nn
from zoo import ARCHITECTURES

import dropit

WAYS = {
    "dropping 0.9": {"gamma": 0.9},
    "int8": {"gamma": 0, "compress": "int8"},
    "int8, dropping 0.9": {"gamma": 0.9, "compress": "int8"},
    "int4": {"gamma": 0, "compress": "int4"},
    "int16": {"gamma": 0, "compress": "int16"},
}
SHOWN = [way for way in WAYS if way != "int16"]  # whose bytes
HEADER = ["model", "plain, MiB", *SHOWN, "int8: error", "worst", "int4: error", "worst", "int16: worst", "int8: time"]
VANISHING = 1e-6  # of the largest gradient


def cache_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that a forward pass saves for backward."""
    with dropit.CacheMeter(model, retain=False) as meter:
        value = loss(model)
    del value
    return meter.total_bytes


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return those of the weights, by name, from a step whose random numbers are the same each time."""
    model.zero_grad()
    torch.manual_seed(1)
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    """Return the relative error of each weight's gradient."""
    norms = {name: grad.norm().item() for name, grad in exact.items()}
    least = VANISHING * max(norms.values())
    return [((ours[name] - exact[name]).norm() / max(norms[name], least)).item() for name in exact]


def time_ratio(models: tuple[nn.Module, nn.Module], loss: Callable[[nn.Module], Tensor], turns: int = 5) -> float:
    """Return the median time of a step of the second model by that of the first."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for model, times in zip(models, taken, strict=True):
            start = time.perf_counter()
            loss(model).backward()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[1]) / statistics.median(taken[0])


def measure(name: str, turns: int) -> dict[str, Any]:
    """Return the row of a model."""
    torch.manual_seed(0)
    model, loss = ARCHITECTURES[name]()
    without_zeros(without_noise(model.train()))
    plain = cache_bytes(model, loss)
    exact = gradients(copy.deepcopy(model), loss)
    row: dict[str, Any] = {"model": name, "plain": plain}
    for way, settings in WAYS.items():
        ours = dropit.to_dropit(copy.deepcopy(model), **settings)
        row[way] = cache_bytes(ours, loss)
        row[f"{way}: errors"] = errors(gradients(ours, loss), exact)
        if way == "int8":
            row["time"] = time_ratio((copy.deepcopy(model), ours), loss, turns)
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row as text."""
    changes = [f"{row[way] / row['plain'] - 1:+.0%}" for way in SHOWN]
    eight, four = row["int8: errors"], row["int4: errors"]
    found = [f"{statistics.median(eight):.1%}", f"{max(eight):.1%}", f"{statistics.median(four):.0%}"]
    found += [f"{max(four):.0%}", f"{max(row['int16: errors']):.3%}"]
    return [row["model"], f"{row['plain'] / 2**20:.2f}", *changes, *found, f"{row['time']:.2f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, metavar="MODEL", default=list(ARCHITECTURES))
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="four models, one step each, to see that it runs")
    args = parser.parse_args()
    names = ["resnet18", "hf llama", "hf t5", "swin_t"] if args.quick else args.models
    print(report.table(HEADER, []), flush=True)
    rows = []
    for name in names:
        rows.append(measure(name, 1 if args.quick else 5))
        print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    report.write(args.output, "architectures", rows, report.table(HEADER, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
