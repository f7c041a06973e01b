"""How far off each weight's gradient is under each way to store what it needs: the errors in docs/benchmarks.md.

    python benchmarks/error.py [--models resnet18 ...] [--gamma 0.9] [--steps 10] [--quick]

Relative to the exact gradient of each parameter that is a matrix or a kernel (no bias, no scale of a normalization),
with the first weights and after some plain steps of SGD, on random inputs: of the median weight and, where nothing is
dropped, of the worst.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import report
import torch
from methods import QUANTIZING, methods
from tasks import TASKS, loss, without_noise
from torch import Tensor, nn

BATCH = {"resnet18_cifar": 32, "resnet18": 16, "resnet50": 4, "convnext_tiny": 4, "vit_b_16": 8, "gpt2": 2}
DROPPING = ("published scheme", "dropping", "channels")
WAYS = (*DROPPING, *QUANTIZING)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of each weight, by name. ``model`` keeps its gradients."""
    loss(model, *batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.dim() > 1 and p.grad is not None}


def errors(model: nn.Module, batch: tuple[Tensor, Tensor], gamma: float) -> dict[str, list[float]]:
    """By way, each weight's relative error."""
    exact = gradients(copy.deepcopy(model), batch)
    found = {}
    for way in WAYS:
        grads = gradients(methods(gamma=gamma)[way](copy.deepcopy(model)), batch)
        found[way] = [((grads[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    header = ["median weight", "steps", *DROPPING, *(cell for way in QUANTIZING for cell in (way, "worst"))]
    print(report.table(header, []), flush=True)
    for name in ["resnet18_cifar"] if args.quick else args.models:
        torch.manual_seed(0)
        task = TASKS[name]
        model = without_noise(task.model().train())
        batch = task.batch(8 if args.quick else BATCH[name])
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for step in range(args.steps + 1):
            if step in (0, args.steps):
                found = errors(model, batch, args.gamma)
                cells = [f"{statistics.median(found[way]):.2f}" for way in DROPPING]
                for way in QUANTIZING:
                    cells += [f"{statistics.median(found[way]):.4f}", f"{max(found[way]):.4f}"]
                print(f"| {task.title} | {step} | {' | '.join(cells)} |", flush=True)
            optimizer.zero_grad()
            loss(model, *batch).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
