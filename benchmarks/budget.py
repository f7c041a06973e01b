"""What a budget of bytes buys: the gradient's error, against that of the best single gamma within the same bytes.

    python benchmarks/budget.py [--quick]

Random weights and inputs. The error is relative, of all parameters' gradients together. The single gamma is the least
that fits, in each of compress="lossless", "int8" and "int4"; the best of the three counts.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dropit

PARTS = (0.25, 0.4, 0.6, 0.8)
MODES = ("lossless", "int8", "int4")
_HALVINGS = 7


class Case(NamedTuple):
    """A model, a batch, and what to minimize."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any], Tensor]


def classifier(model: nn.Module, size: int, batch: int) -> Case:
    """With random images and labels."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    return Case(model, images, lambda output: cross_entropy(output, labels))


def vit() -> nn.Module:
    """torchvision's, but for the head: its zeros let no gradient through."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def gpt2() -> Case:
    """Hugging Face's, without dropout, on random tokens."""
    config = transformers.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    tokens = torch.randint(config.vocab_size, (2, 256))
    model = transformers.GPT2LMHeadModel(config)
    return Case(model, {"input_ids": tokens, "labels": tokens}, lambda output: output.loss)


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-18, 224 x 224": lambda: classifier(torchvision.models.resnet18(), 224, 8),
    "ViT-B/16, 224 x 224": lambda: classifier(vit(), 224, 2),
    "ConvNeXt-T, 224 x 224": lambda: classifier(torchvision.models.convnext_tiny(stochastic_depth_prob=0.0), 224, 2),
    "GPT-2, 256 tokens": gpt2,
}
QUICK = {"ResNet-18, 64 x 64": lambda: classifier(torchvision.models.resnet18(), 64, 4)}


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's output."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def held(model: nn.Module, batch: Any) -> int:
    """Bytes held for backward."""
    with dropit.CacheMeter(model, retain=False) as meter:
        output = forward(model, batch)
    del output
    return meter.total_bytes


def gradient(case: Case) -> Tensor:
    """Of all parameters, as one vector."""
    case.model.zero_grad()
    case.loss_fn(forward(case.model, case.batch)).backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in case.model.parameters() if parameter.grad is not None])
    case.model.zero_grad()
    return grads


def single_gamma(case: Case, compress: str, budget: int) -> float | None:
    """Convert under the least gamma that fits; None where none does."""
    low, high = 0.0, 0.99
    for gamma in (high, *(None,) * _HALVINGS):
        middle = (low + high) / 2 if gamma is None else gamma
        dropit.to_dropit(case.model, gamma=middle, compress=compress)
        fits = held(case.model, case.batch) <= budget
        if gamma is not None and not fits:
            return None
        low, high = (low, middle) if fits else (middle, high)
    dropit.to_dropit(case.model, gamma=high, compress=compress)
    return high


def rows(name: str, case: Case, parts: tuple[float, ...]) -> None:
    """Print the table's rows of one model."""
    plain, exact = held(case.model, case.batch), gradient(copy.deepcopy(case))

    def error() -> float:
        return ((gradient(case) - exact).norm() / exact.norm()).item()

    for part in parts:
        budget = int(part * plain)
        dropit.to_dropit(case.model, budget=budget, example_input=case.batch, loss_fn=case.loss_fn)
        ours = f"{held(case.model, case.batch) / budget:.3f} | {error():.4f}"
        others = []
        for compress in MODES:
            gamma = single_gamma(case, compress, budget)
            if gamma is not None:
                others.append((error(), f"{compress}, gamma {gamma:.2f}"))
        best = "{:.4f} ({})".format(*min(others)) if others else "does not fit"
        dropit.from_dropit(case.model)
        print(f"| {name} | {part:.0%} of {plain / 2**20:.0f} | {ours} | {best} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", "gamma .* saves nothing")
    transformers.logging.set_verbosity_error()
    print("| model | budget, MiB | held / budget | gradient error | error of the best single gamma |")
    print("|---|---:|---:|---:|---:|")
    for name, make in (QUICK if quick else CASES).items():
        torch.manual_seed(0)
        rows(name, make(), PARTS[:2] if quick else PARTS)


if __name__ == "__main__":
    main()
