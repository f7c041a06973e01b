"""What compiled models save for backward, beside eager ones: plain, and in int8 with nothing dropped.

    python benchmarks/compiled.py [--models resnet18 ...] [--backends aot_eager inductor] [--quick] [--output DIRECTORY]

Models of zoo.py, dropout included. Bytes are those of the second step. The error is of the gradient of the median
weight of all matrices and kernels, relative to that of the plain model with the same backend, whose random numbers are
the same. Each model is to be one graph, or the program stops.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import report
import torch
import torch._dynamo
from architectures import errors
from torch import Tensor, nn
from torch._inductor import config as inductor
from zoo import ARCHITECTURES

import dropit

MODELS = ("resnet18", "timm vit_small", "hf gpt2", "hf llama", "hf t5", "swin_t")
HEADER = ["model, backend", "plain, MiB", "int8", "compiled", "compiled int8", "by eager's", "error", "compiled's"]


def step(model: nn.Module, forward: Callable[..., Any], loss: Callable[[Any], Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes that the second of two steps saves, and the gradients of its weights."""
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        with dropit.CacheMeter(model) as meter:
            value = loss(forward)
        value.backward()
    return meter.total_bytes, {n: p.grad for n, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}


def measure(name: str, backend: str) -> dict[str, Any]:
    """Return the row of a model and a backend."""
    torch.manual_seed(0)
    plain, loss = ARCHITECTURES[name]()
    ours = dropit.to_dropit(copy.deepcopy(plain.train()), gamma=0, compress="int8")
    row: dict[str, Any] = {"model": name, "backend": backend}
    exact = {}
    for label, model in (("plain", plain), ("int8", ours)):
        for prefix in ("", "compiled "):
            forward = model
            if prefix:
                torch._dynamo.reset()
                forward = torch.compile(model, backend=backend, fullgraph=True)
            row[prefix + label], grads = step(model, forward, loss)
            if label == "plain":
                exact[prefix] = {n: grad.clone() for n, grad in grads.items()}
            else:
                row[f"{prefix}error"] = statistics.median(errors(grads, exact[prefix]))
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return the row as text."""
    changes = [f"{row[key] / row['plain'] - 1:+.0%}" for key in ("int8", "compiled plain", "compiled int8")]
    ratio = f"{row['compiled int8'] / row['int8']:.2f}"
    found = [f"{row[key]:.1%}" for key in ("error", "compiled error")]
    return [f"{row['model']}, {row['backend']}", f"{row['plain'] / 2**20:.2f}", *changes, ratio, *found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, metavar="MODEL", default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=("aot_eager", "inductor"), default=["aot_eager", "inductor"])
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="one model and backend, to see that it runs")
    args = parser.parse_args()
    models, backends = (["hf vit"], ["aot_eager"]) if args.quick else (args.models, args.backends)
    print(report.table(HEADER, []), flush=True)
    rows = []
    with inductor.patch(fallback_random=True):
        for name in models:
            for backend in backends:
                rows.append(measure(name, backend))
                print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    report.write(args.output, "compiled", rows, report.table(HEADER, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
