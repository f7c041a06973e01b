"""Time of a training step by each way to hold less, in one run: the README's ratios.

    python benchmarks/step.py [--gamma 0.9] [--repeats 7] [--autocast] [--quick]

The variants take turns, step by step, after a warm-up. The ratio is the median over the turns of a variant's time by
the plain model's in the same turn. A step is forward, backward and SGD.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from methods import methods
from torch import nn

from dropit.training.models import build_model

ROWS = {
    "ResNet-18, CIFAR stem, batch 32": ("resnet18", 32, "cifar", 32),
    "ViT-B/16, 224 x 224, batch 4": ("vit_b_16", 224, "imagenet", 4),
}


QUICK = {"ResNet-18, CIFAR stem, batch 4": ("resnet18", 32, "cifar", 4)}


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, autocast: bool) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None

    def step() -> float:
        wait()
        start = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--quick", action="store_true", help="a small model, once, to see that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = methods("fastmink", args.gamma)
    precision = "bfloat16 autocast" if args.autocast else "float32"
    where = f"{device}, {torch.get_num_threads()} threads"
    print(f"fastmink, gamma {args.gamma}, {precision}; torch {torch.__version__}, {where}\n")
    print(f"| a step | plain, ms | {' | '.join(list(columns)[1:])} |\n|---|{'---:|' * len(columns)}")
    for name, (arch, size, stem, batch) in (QUICK if args.quick else ROWS).items():
        torch.manual_seed(0)
        model = build_model(arch, 100, size, stem=stem).to(device)
        images = torch.randn(batch, 3, size, size, device=device)
        labels = torch.randint(100, (batch,), device=device)
        models = [convert(copy.deepcopy(model)) for convert in columns.values()]
        steps = [stepper(each, images, labels, autocast=args.autocast) for each in models]
        turns = [[step() for step in steps] for _ in range((1 if args.quick else args.repeats) + 2)][2:]
        plain = statistics.median(turn[0] for turn in turns) * 1000
        ratios = [statistics.median(turn[i] / turn[0] for turn in turns) for i in range(1, len(steps))]
        print(f"| {name} | {plain:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
