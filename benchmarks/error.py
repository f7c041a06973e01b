"""How far off each layer's gradient is under each way to store what it needs: the README's errors.

    python benchmarks/error.py [--models resnet18 ...] [--gamma 0.9] [--steps 10] [--quick]

Relative to the exact gradient of a layer's own parameters, with the first weights and after some plain steps of SGD, on
random images. "Extra" is the most, over the layers, by which the error is above that of dropping alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import report
import torch
from methods import OURS
from tasks import TASKS, loss, without_noise
from torch import Tensor, nn

import dropit

BATCH = {"resnet18_cifar": 32, "resnet18": 16, "vit_b_16": 8}


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Each layer's, of its own parameters, as one vector."""
    model = copy.deepcopy(model)
    loss(model, *batch).backward()
    own = {fqn: [p.grad for p in module.parameters(recurse=False)] for fqn, module in model.named_modules()}
    return {fqn: torch.cat([grad.flatten() for grad in grads]) for fqn, grads in own.items() if grads}


def errors(model: nn.Module, batch: tuple[Tensor, Tensor], gamma: float) -> dict[str, list[float]]:
    """By way, each layer's relative error."""
    exact = gradients(model, batch)
    found = {}
    for compress in OURS:
        grads = gradients(dropit.to_dropit(copy.deepcopy(model), gamma=gamma, compress=compress), batch)
        found[compress] = [((grads[fqn] - exact[fqn]).norm() / exact[fqn].norm()).item() for fqn in exact]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    args = parser.parse_args()
    header = ["a layer's gradient", "steps", "dropping: median", "int8: median", "extra", "int4: median", "extra"]
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
                cells = [f"{statistics.median(found[OURS[0]]):.2f}"]
                for compress in OURS[1:]:
                    extra = max(a - b for a, b in zip(found[compress], found[OURS[0]], strict=True))
                    cells += [f"{statistics.median(found[compress]):.4f}", f"{extra:.4f}"]
                print(f"| {task.title} | {step} | {' | '.join(cells)} |", flush=True)
            optimizer.zero_grad()
            loss(model, *batch).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
