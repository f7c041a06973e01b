"""What models hold for backward, plain and with DropIT: the README's table.

    python benchmarks/memory.py [--gamma 0.9] [--strategy fastmink] [--batch 4]

Bytes are counted by CacheMeter in one forward pass in training mode, float32, on the CPU, and given per sample.
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from torch import nn

import dropit
from dropit.training.models import build_model

MIB = 2**20
ROWS = {
    "ResNet-18, CIFAR stem, 32 x 32": ("resnet18", 32, "cifar"),
    "ResNet-18, 224 x 224": ("resnet18", 224, "imagenet"),
    "ResNet-50, 224 x 224": ("resnet50", 224, "imagenet"),
    "ConvNeXt-T, 224 x 224": ("convnext_tiny", 224, "imagenet"),
    "ViT-B/16, 224 x 224": ("vit_b_16", 224, "imagenet"),
}


def held(model: nn.Module, images: torch.Tensor) -> float:
    """MiB per sample that a forward pass holds for backward."""
    with dropit.CacheMeter(model, retain=False) as meter:
        output = model(images)
    del output
    return meter.total_bytes / len(images) / MIB


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--strategy", choices=dropit.STRATEGIES, default="fastmink")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    print(f"{args.strategy}, gamma {args.gamma}; torch {torch.__version__}, torchvision {torchvision.__version__}\n")
    print("| model | plain, MiB per sample | DropIT | change |\n|---|---:|---:|---:|")
    for name, (arch, size, stem) in ROWS.items():
        torch.manual_seed(0)
        model = build_model(arch, 1000, size, stem=stem)
        images = torch.randn(args.batch, 3, size, size)
        plain = held(model, images)
        ours = held(dropit.to_dropit(model, args.strategy, args.gamma), images)
        print(f"| {name} | {plain:.2f} | {ours:.2f} | {ours / plain - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
