"""How far off each layer's gradient is under each way to store what it needs: the README's errors.

    python benchmarks/error.py [--gamma 0.9] [--steps 10] [--quick]

Relative to the exact gradient of a layer's own parameters, with the first weights and after some plain steps of SGD, on
random images. "Extra" is the most, over the layers, by which the error is above that of dropping alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dropit
from dropit.training.models import build_model


def vit() -> nn.Module:
    """torchvision's, but for the head: its zeros let no gradient through."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


ROWS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-18, CIFAR stem, batch 32": (lambda: build_model("resnet18", 10, 32, stem="cifar"), 32, 32),
    "ResNet-18, 224 x 224, batch 16": (torchvision.models.resnet18, 224, 16),
    "ViT-B/16, 224 x 224, batch 8": (vit, 224, 8),
}
QUICK = {"ResNet-18, CIFAR stem, batch 8": (ROWS["ResNet-18, CIFAR stem, batch 32"][0], 32, 8)}


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Each layer's, of its own parameters, as one vector."""
    model = copy.deepcopy(model)
    cross_entropy(model(images), labels).backward()
    own = {fqn: [p.grad for p in module.parameters(recurse=False)] for fqn, module in model.named_modules()}
    return {fqn: torch.cat([grad.flatten() for grad in grads]) for fqn, grads in own.items() if grads}


def errors(model: nn.Module, images: Tensor, labels: Tensor, gamma: float) -> dict[str, list[float]]:
    """By way, each layer's relative error."""
    exact = gradients(model, images, labels)
    found = {}
    for compress in ("lossless", "int8", "int4"):
        grads = gradients(dropit.to_dropit(copy.deepcopy(model), gamma=gamma, compress=compress), images, labels)
        found[compress] = [((grads[fqn] - exact[fqn]).norm() / exact[fqn].norm()).item() for fqn in exact]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    print("| error of a layer's gradient | steps | dropping: median | int8: median | extra | int4: median | extra |")
    print(f"|---|{'---:|' * 6}", flush=True)
    for name, (make, size, batch) in (QUICK if args.quick else ROWS).items():
        torch.manual_seed(0)
        model = make()
        images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for step in range(args.steps + 1):
            if step in (0, args.steps):
                found = errors(model, images, labels, args.gamma)
                cells = [f"{statistics.median(found['lossless']):.2f}"]
                for compress in ("int8", "int4"):
                    extra = max(a - b for a, b in zip(found[compress], found["lossless"], strict=True))
                    cells += [f"{statistics.median(found[compress]):.4f}", f"{extra:.4f}"]
                print(f"| {name} | {step} | {' | '.join(cells)} |", flush=True)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
