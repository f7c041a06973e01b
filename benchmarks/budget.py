"""What a budget of bytes buys: the gradient's error, against that of the best single gamma within the same bytes.

    python benchmarks/budget.py [--models resnet18 vit_b_16 ...] [--quick]

Random weights and inputs, no dropout. Errors are relative: of all parameters' gradients together, and the root mean
square of each weight's own. The single gamma is the least that fits, in each of compress="lossless", "int16", "int8",
"int4" and "int2"; the one of the five whose gradients together are best counts.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import report
import torch
from tasks import MIB, TASKS, cache_bytes, criterion, forward, loss, without_noise
from torch import Tensor, nn

import dropit

PARTS = (0.25, 0.4, 0.6, 0.8)
COMPRESS = ("lossless", "int16", "int8", "int4", "int2")
_HALVINGS = 7


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of all parameters."""
    model.zero_grad()
    loss(model, *batch).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return grads


def errors(grads: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Relative to the exact ones: of all together, and the root mean square of those of each weight by itself."""
    off = torch.stack([(grad - other).norm() for grad, other in zip(grads, exact, strict=True)])
    norms = torch.stack([other.norm() for other in exact])
    weights = torch.tensor([other.dim() > 1 for other in exact])
    return (off.norm() / norms.norm()).item(), (off / norms)[weights].square().mean().sqrt().item()


def single_gamma(model: nn.Module, fits: Callable[[], bool], compress: str) -> float | None:
    """Convert under the least gamma that fits; None where none does."""
    low, high = 0.0, 0.99

    def tried(gamma: float) -> bool:
        dropit.to_dropit(model, gamma=gamma, compress=compress)
        return fits()

    if tried(low):
        return low
    if not tried(high):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if tried(middle) else (middle, high)
    tried(high)
    return high


def rows(title: str, model: nn.Module, batch: tuple[Tensor, Tensor], parts: tuple[float, ...]) -> None:
    """Print the table's rows of one model."""
    inputs, labels = batch

    def cache() -> int:
        return cache_bytes(model, lambda: forward(model, inputs))

    def error() -> tuple[float, float]:
        return errors(gradients(model, batch), exact)

    plain, exact = cache(), gradients(copy.deepcopy(model), batch)
    for part in parts:
        budget = int(part * plain)
        dropit.fit_budget(model, budget, inputs, loss_fn=lambda output: criterion(output, labels))
        ours = "{:.3f} | {:.1e} | {:.1e}".format(cache() / budget, *error())
        others = []
        for compress in COMPRESS:
            gamma = single_gamma(model, lambda budget=budget: cache() <= budget, compress)
            if gamma is not None:
                others.append((*error(), f"{compress}, gamma {gamma:.2f}"))
        best = "{:.1e} | {:.1e} | {}".format(*min(others)) if others else "| | does not fit"
        dropit.from_dropit(model)
        print(f"| {title} | {part:.0%} of {plain / MIB:.0f} | {ours} | {best} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["resnet18", "vit_b_16", "convnext_tiny", "gpt2"]
    parser.add_argument("--models", nargs="+", choices=TASKS, default=models)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "gamma .* saves nothing")
    header = [
        "model",
        "budget, MiB",
        "saved / budget",
        "error",
        "by weight",
        "single gamma: error",
        "by weight",
        "which",
    ]
    print(report.table(header, []), flush=True)
    for name in ["resnet18_cifar"] if args.quick else args.models:
        torch.manual_seed(0)
        task = TASKS[name]
        model = without_noise(task.model().train())
        batch = task.batch(8 if name.startswith("resnet") else 2)
        rows(task.title, model, batch, PARTS[:2] if args.quick else PARTS)


if __name__ == "__main__":
    main()
