"""What models save for backward, by each way to save less: a table of docs/models.md.

    python benchmarks/memory.py [--models resnet18 vit_b_16 ...] [--methods plain int8 ...] [--strategy fastmink]
                                [--gamma 0.9] [--batch 4] [--autocast] [--output DIRECTORY]

MiB counted by CacheMeter in a forward pass in training mode, up to the logits, extrapolated to a batch of 128.
Checkpointing is per block. The peak of a step on a GPU is ``step.py``'s.
"""

from __future__ import annotations

import argparse
import copy

import report
import torch
from methods import USUAL, methods
from tasks import MIB, TASKS, Task, cache_bytes, forward

import dropit

SCALED_TO = 128


def scaled(task: Task, method: str, args: argparse.Namespace, device: str) -> float:
    """MiB at the batch of 128. What does not grow with the batch, as autocast's copies of the weights, counts once."""
    torch.manual_seed(0)
    model = methods(args.strategy, args.gamma)[method](copy.deepcopy(task.model()).to(device).train())
    inputs = task.batch(args.batch)[0].to(device)
    half = args.batch // 2
    with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
        some, all_ = (
            cache_bytes(model, lambda part=part: forward(model, part)) for part in (inputs[:half].clone(), inputs)
        )
    return (some + (all_ - some) / half * (SCALED_TO - half)) / MIB


def main() -> None:
    """Print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=methods(), default=USUAL)
    parser.add_argument("--strategy", choices=dropit.STRATEGIES, default="fastmink")
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=4, help="what is measured, with half of it (default: 4)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", help="where to write the results")
    args = parser.parse_args()
    args.methods = ["plain", *(name for name in args.methods if name != "plain")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16 autocast" if args.autocast else "float32"
    print(f"{args.strategy}, gamma {args.gamma}, {precision}; MiB at batch {SCALED_TO}; {report.hardware()}\n")
    header, records, rows = ["saved for backward", *args.methods], [], []
    print(report.table(header, []), flush=True)
    for name in args.models:
        task = TASKS[name]
        sizes = {method: scaled(task, method, args, device) for method in args.methods}
        records += [{"model": task.title, "method": method, "cache_mib": size} for method, size in sizes.items()]
        plain, *others = sizes.values()
        rows.append([task.title, f"{plain:.0f}", *(f"{size:.0f} ({size / plain - 1:+.0%})" for size in others)])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    report.write(args.output, f"memory-{'bf16' if args.autocast else 'fp32'}", records, report.table(header, rows))


if __name__ == "__main__":
    main()
