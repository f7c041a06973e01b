"""The largest batch that fits in a given memory by each way to save less, and how fast it trains there.

    python benchmarks/batch.py [--models resnet18_cifar ...] [--methods plain checkpointing ...] [--memory GIB]
                               [--gamma 0.9] [--autocast] [--output DIRECTORY] [--quick]

On a GPU: the largest batch, to within 4 %, of which a step does not run out of ``--memory`` (default: 16 GiB, all that
the process may allocate). Without one: the largest whose cache, as CacheMeter counts it, fits in ``--memory`` (default:
0.5 GiB). Samples a second are those of the fastest of three steps.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import report
import torch
from methods import USUAL, methods
from step import stepper
from tasks import TASKS, Task, cache_bytes, forward
from torch import nn

GIB = 2**30


def largest(fits: Callable[[int], bool], first: int) -> int:
    """The largest number that fits, to within 4 %, if all below it do; 0 if 1 does not."""
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 25):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def seconds(model: nn.Module, task: Task, batch_size: int, args: argparse.Namespace, device: str) -> float:
    """Of the fastest of three steps."""
    batch = tuple(part.to(device) for part in task.batch(batch_size))
    step = stepper(model, batch, autocast=args.autocast)
    return min(step() for _ in range(3))


def measure(task: Task, method: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The largest batch and its speed."""
    torch.manual_seed(0)
    model = methods(gamma=args.gamma)[method](task.model().to(device).train())
    limit = args.memory * GIB
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

        def fits(n: int) -> bool:
            try:
                seconds(model, task, n, args, device)
            except torch.OutOfMemoryError:
                return False
            finally:
                model.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
            return True
    else:
        with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
            some, more = (cache_bytes(model, lambda n=n: forward(model, task.batch(n)[0])) for n in (2, 4))

        def fits(n: int) -> bool:
            return some + (more - some) / 2 * (n - 2) <= limit

    found = largest(fits, 8)
    speed = found / seconds(model, task, found, args, device) if found else 0.0
    return {"model": task.title, "method": method, "batch": found, "samples_per_s": speed}


def main() -> None:
    """Print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=["resnet18_cifar", "vit_b_16"])
    parser.add_argument("--methods", nargs="+", choices=methods(), default=USUAL)
    parser.add_argument("--memory", type=float, help="GiB")
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="one model in little memory, to see that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        args.models, args.memory = ["resnet18_cifar"], 1.0 if device == "cuda" else 0.05
    args.memory = args.memory or (16.0 if device == "cuda" else 0.5)
    precision = "bfloat16 autocast" if args.autocast else "float32"
    print(f"gamma {args.gamma}, {precision}, {args.memory} GiB; {report.hardware()}; batch, samples a second\n")
    header, records, rows = ["largest batch", *args.methods], [], []
    print(report.table(header, []), flush=True)
    for name in args.models:
        found = [measure(TASKS[name], method, args, device) for method in args.methods]
        records += found
        rows.append([TASKS[name].title, *(f"{each['batch']}, {each['samples_per_s']:.1f}" for each in found)])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    report.write(
        args.output, f"batch-{device}-{'bf16' if args.autocast else 'fp32'}", records, report.table(header, rows)
    )


if __name__ == "__main__":
    main()
