"""Time of a training step, plain and with DropIT, in one run: the README's ratios.

    python benchmarks/step.py [--gamma 0.9] [--repeats 9]

The variants take turns, step by step, after a warm-up; medians are compared. A step is forward, backward and SGD.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import dropit
from dropit.training.models import build_model

ROWS = {
    "ResNet-18, CIFAR stem, batch 32": ("resnet18", 32, "cifar", 32),
    "ViT-B/16, 224 x 224, batch 4": ("vit_b_16", 224, "imagenet", 4),
}


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"fastmink, gamma {args.gamma}; torch {torch.__version__}, CPU, {torch.get_num_threads()} threads\n")
    print("| model | plain, ms | DropIT, ms | ratio |\n|---|---:|---:|---:|")
    for name, (arch, size, stem, batch) in ROWS.items():
        torch.manual_seed(0)
        plain = build_model(arch, 100, size, stem=stem)
        ours = dropit.to_dropit(copy.deepcopy(plain), gamma=args.gamma)
        images, labels = torch.randn(batch, 3, size, size), torch.randint(100, (batch,))
        steps = [stepper(model, images, labels) for model in (plain, ours)]
        times = [[step() for step in steps] for _ in range(args.repeats + 2)][2:]
        medians = [statistics.median(row[variant] for row in times) * 1000 for variant in (0, 1)]
        print(f"| {name} | {medians[0]:.0f} | {medians[1]:.0f} | {medians[1] / medians[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
