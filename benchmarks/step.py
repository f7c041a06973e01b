"""Time and memory of a training step by each way to save less, in one run.

    python benchmarks/step.py [--models resnet18_cifar vit_b_16] [--methods plain checkpointing ...] [--gamma 0.9]
                              [--repeats 7] [--autocast] [--output DIRECTORY] [--quick]

A step is forward, backward and SGD. The variants take turns, step by step, after a warm-up; a variant's time is the
median, over the turns, of its time by the plain model's in the same turn. Its memory is what is saved for backward
(CacheMeter) and, on a GPU, the peak of a step, both by the plain model's. ``--output`` writes JSON, Markdown and a
picture of time against memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch
from methods import USUAL, methods
from tasks import MIB, TASKS, Task, cache_bytes, forward, loss
from torch import nn

WARM_UP = 2


def stepper(model: nn.Module, batch: tuple[torch.Tensor, ...], *, autocast: bool) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    device = batch[0].device.type
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step() -> float:
        wait()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(model, *batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def peak(step: Callable[[], float]) -> int:
    """Bytes that a step on a GPU allocates at its peak, above what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(task: Task, batch_size: int, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """A record of each method."""
    torch.manual_seed(0)
    model = task.model().to(device).train()
    batch = tuple(part.to(device) for part in task.batch(batch_size))
    convert = methods(gamma=args.gamma)
    models = {name: convert[name](copy.deepcopy(model)) for name in args.methods}
    steps = {name: stepper(each, batch, autocast=args.autocast) for name, each in models.items()}
    for _ in range(1 if args.quick else WARM_UP):
        for step in steps.values():
            step()
    turns = [{name: step() for name, step in steps.items()} for _ in range(args.repeats)]
    records = []
    for name, each in models.items():
        with torch.autocast(device, torch.bfloat16, enabled=args.autocast):
            cache = cache_bytes(each, lambda each=each: forward(each, batch[0]))
        records.append(
            {
                "model": task.title,
                "batch": batch_size,
                "method": name,
                "ms": statistics.median(turn[name] for turn in turns) * 1000,
                "time_ratio": statistics.median(turn[name] / turn["plain"] for turn in turns),
                "cache_mib": cache / MIB,
            }
            | ({"peak_mib": peak(steps[name]) / MIB} if device == "cuda" else {})
        )
    return records


def row(records: list[dict[str, Any]], key: str) -> list[str]:
    """Of the table: the plain model's numbers, then each method's by them; ``key``: of the memory that is meant."""
    plain = records[0]
    cells = [f"{plain['model']}, batch {plain['batch']}", f"{plain['ms']:.0f} ms, {plain[key]:.0f} MiB"]
    return cells + [f"{each['time_ratio']:.2f} ({each[key] / plain[key] - 1:+.0%})" for each in records[1:]]


def draw(path: str, records: list[dict[str, Any]], key: str) -> None:
    """A panel a model: each method's time by its memory, both by the plain model's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    titles = list(dict.fromkeys(record["model"] for record in records))
    names = list(dict.fromkeys(record["method"] for record in records))
    figure, panels = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3.6), squeeze=False, layout="constrained")
    for panel, title in zip(panels[0], titles, strict=True):
        plain, *_ = here = [record for record in records if record["model"] == title]
        for place, record in enumerate(sorted(here, key=lambda record: record[key])):
            x, y = record[key] / plain[key], record["time_ratio"]
            color = f"C{names.index(record['method'])}"
            panel.plot(x, y, "o", color=color)
            side = {"xytext": (5, -5), "va": "top"} if place % 2 else {"xytext": (5, 5), "va": "bottom"}
            panel.annotate(record["method"], (x, y), textcoords="offset points", fontsize=8, color=color, **side)
        panel.set_title(title, fontsize=10)
        panel.set(xlabel="memory, by the plain model's", xlim=(0, 1.5))
        panel.margins(y=0.15)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("time of a step, by the plain model's")
    figure.savefig(path)


def main() -> None:
    """Print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=["resnet18_cifar", "vit_b_16"])
    parser.add_argument("--methods", nargs="+", choices=methods(), default=USUAL)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--name", help="of the results, beside device and precision")
    parser.add_argument("--quick", action="store_true", help="one small model, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.models, args.repeats = ["resnet18_cifar"], 1
    args.methods = ["plain", *(name for name in args.methods if name != "plain")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bfloat16 autocast" if args.autocast else "float32"
    memory, key = ("peak of a step", "peak_mib") if device == "cuda" else ("saved for backward", "cache_mib")
    print(f"gamma {args.gamma}, {precision}; {report.hardware()}; time (and {memory}) by the plain model's\n")
    header, records, rows = ["a step", *args.methods], [], []
    print(report.table(header, []), flush=True)
    for name in args.models:
        task = TASKS[name]
        found = measure(task, 4 if args.quick else task.step_batch(device), args, device)
        records += found
        rows.append(row(found, key))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
        gc.collect()
    title = "-".join(["step", device, "bf16" if args.autocast else "fp32", *([args.name] if args.name else [])])
    report.write(args.output, title, records, report.table(header, rows))
    if args.output:
        draw(f"{args.output}/{report.environment()['date']}-{title}.svg", records, key)


if __name__ == "__main__":
    main()
