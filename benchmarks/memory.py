"""What models hold for backward, by each way to hold less: the README's table.

    python benchmarks/memory.py [--gamma 0.9] [--strategy fastmink] [--batch 4] [--autocast] [--compiled]

MiB counted by CacheMeter in a forward pass in training mode, extrapolated to a batch of 128. On a GPU a second table
gives the measured peak of a step. Checkpointing is per block; --compiled adds torch.compile with half of its budget.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torchvision
from methods import methods
from torch import Tensor, nn

import dropit
from dropit.training.models import build_model

MIB = 2**20
SCALED_TO = 128
ROWS = {
    "ResNet-18, CIFAR stem, 32 x 32": ("resnet18", 32, "cifar"),
    "ResNet-18, 224 x 224": ("resnet18", 224, "imagenet"),
    "ResNet-50, 224 x 224": ("resnet50", 224, "imagenet"),
    "ConvNeXt-T, 224 x 224": ("convnext_tiny", 224, "imagenet"),
    "ViT-B/16, 224 x 224": ("vit_b_16", 224, "imagenet"),
}


def held(model: nn.Module, images: Tensor, *, autocast: bool) -> float:
    """Bytes that a forward pass holds for backward."""
    with dropit.CacheMeter(model) as meter, torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        output = model(images)
    del output
    return meter.total_bytes


def peak(model: nn.Module, images: Tensor, *, autocast: bool) -> float:
    """Bytes that a step on a GPU allocates at its peak, above what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(images).float().square().mean()
    loss.backward()
    model.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def table(heading: str, measure: Callable[..., float], args: argparse.Namespace, device: str) -> None:
    """Print one table, MiB scaled to the batch of 128."""
    columns = methods(args.strategy, args.gamma, with_compiled=args.compiled)
    print(f"| {heading} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, (arch, size, stem) in ROWS.items():
        torch.manual_seed(0)
        model = build_model(arch, 1000, size, stem=stem).to(device)
        images = torch.randn(args.batch, 3, size, size, device=device)
        half = args.batch // 2
        sizes = []
        for convert in columns.values():
            ours = convert(copy.deepcopy(model))
            some, all_ = (measure(ours, part, autocast=args.autocast) for part in (images[:half].clone(), images))
            # What does not grow with the batch, as autocast's copies of the weights, counts once.
            sizes.append((some + (all_ - some) / half * (SCALED_TO - half)) / MIB)
        cells = [f"{sizes[0]:.0f}", *(f"{size:.0f} ({size / sizes[0] - 1:+.0%})" for size in sizes[1:])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--strategy", choices=dropit.STRATEGIES, default="fastmink")
    parser.add_argument("--batch", type=int, default=4, help="what is measured, with half of it (default: 4)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compiled", action="store_true", help="with a column for torch.compile")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16 autocast" if args.autocast else "float32"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {device}"
    print(f"{args.strategy}, gamma {args.gamma}, {precision}; MiB at batch {SCALED_TO}; {versions}\n")
    table("held for backward", held, args, device)
    if device == "cuda":
        print()
        table("peak of a step", peak, args, device)


if __name__ == "__main__":
    main()
