"""What each layer takes of the host's time on a GPU's way, where the device has nothing to do.

    python benchmarks/host.py [--profile LAYER] [--quick] [--output DIRECTORY]

Tensors are small and on a CPU, and Triton's kernels are not launched: what is left is Python, PyTorch's dispatch and
its small operators. In microseconds of a forward and a backward pass, plain and converted, with the number of launches
that are left out; each takes some 10 to 50 more.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import report
import torch
from torch import Tensor, nn

import dropit
from dropit import ops, snapshot
from dropit.ops import triton

HEADER = [
    "layer",
    "plain: forward",
    "backward",
    "lossless: forward",
    "backward",
    "int8: forward",
    "backward",
    "launches",
]
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "lossless": {"gamma": 0.9},
    "int8": {"gamma": 0, "compress": "int8"},
}


class Attention(nn.Module):
    """Scaled dot-product attention, as a model calls it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, heads, length, width)."""
        return nn.functional.scaled_dot_product_attention(x, x, x)


def image() -> Tensor:
    """Small, with eight channels."""
    return torch.randn(2, 8, 8, 8)


def tokens() -> Tensor:
    """Of width 16."""
    return torch.randn(2, 32, 16)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(16, 16), tokens),
    "Conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1), image),
    "ReLU": (nn.ReLU, image),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), image),
    "LayerNorm": (lambda: nn.LayerNorm(16), tokens),
    "GELU": (nn.GELU, tokens),
    "Dropout": (lambda: nn.Dropout(0.1), tokens),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), image),
    "attention": (Attention, lambda: torch.randn(2, 2, 32, 16)),
    "Conv2d, BatchNorm2d, ReLU": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        image,
    ),
    "LayerNorm, Linear, GELU, Linear": (
        lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)),
        tokens,
    ),
}


class Times(NamedTuple):
    """Microseconds."""

    forward: float
    backward: float


def stubbed(launches: list[str]) -> ExitStack:
    """Have tensors on a CPU take a GPU's way, and note the launches of kernels instead of making them."""
    stack = ExitStack()
    stands_in: dict[tuple[Any, str], Callable[..., Any]] = {
        (ops, "_has_kernels"): lambda x: True,
        (snapshot, "_digest"): lambda x: None,  # it is of tensors on a CPU
        (triton, "_launch"): lambda kernel, *_, **__: launches.append(kernel.fn.__name__),
    }
    for (module, name), function in stands_in.items():
        stack.enter_context(mock.patch.object(module, name, function))
    return stack


def converted(layer: nn.Module, settings: dict[str, Any] | None) -> nn.Module:
    """The layer in a model."""
    model = nn.Sequential(layer, nn.Linear(1, 1))  # without a layer that drops a model is refused
    if settings is not None:
        dropit.to_dropit(model, **settings)
    return model[0].train()


def step(model: nn.Module, x: Tensor) -> Times:
    """Of one pass each."""
    start = time.perf_counter()
    y = model(x)
    middle = time.perf_counter()
    y.backward(y.detach())
    return Times(1e6 * (middle - start), 1e6 * (time.perf_counter() - middle))


def measure(name: str, turns: int) -> dict[str, Any]:
    """Return the row of a layer."""
    make, inputs = CASES[name]
    row: dict[str, Any] = {"layer": name}
    for way, settings in WAYS.items():
        torch.manual_seed(0)
        model, x = converted(make(), settings), inputs().requires_grad_()
        launches: list[str] = []
        with stubbed(launches):
            times = [step(model, x) for _ in range(turns)][turns // 10 :]
        row[way] = [statistics.median(each) for each in zip(*times, strict=True)]
        row[f"{way}: launches"] = len(launches) / turns
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row as text."""
    return [row["layer"], *[f"{each:.0f}" for way in WAYS for each in row[way]], f"{row['int8: launches']:.0f}"]


def profile(name: str, way: str) -> None:
    """Print where the time of a layer goes."""
    make, inputs = CASES[name]
    model, x = converted(make(), WAYS[way]), inputs().requires_grad_()
    with stubbed([]):
        for _ in range(50):
            step(model, x)
        with cProfile.Profile() as found:
            for _ in range(500):
                step(model, x)
    pstats.Stats(found).sort_stats("cumtime").print_stats(60)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile", choices=CASES, metavar="LAYER", help="print where the time of this one goes, in int8"
    )
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="few passes, to see that it runs")
    args = parser.parse_args()
    if args.profile:
        profile(args.profile, "int8")
        return
    rows = [measure(name, 20 if args.quick else 1000) for name in CASES]
    markdown = report.table(HEADER, [cells(row) for row in rows])
    print(markdown)
    report.write(args.output, "host", rows, markdown)


if __name__ == "__main__":
    main()
