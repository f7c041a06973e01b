"""How fast packing, unpacking and quantizing are, by each implementation that runs here.

    python benchmarks/ops.py [--numel 4194304] [--gamma 0.9] [--repeats 20] [--output DIRECTORY] [--quick]

GB/s count the bytes that an operation has to read and write at least, once each; beside them stands the part of what
a copy of the same tensor reaches in the same run. ``topk`` selects over the whole tensor, as the first release does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import report
import torch

from dropit.ops import cpu, reference
from dropit.packed import flatten, positions_nbytes

BLOCK = 256


def implementations(device: str) -> dict[str, Any]:
    """The modules that work on ``device``."""
    if device == "cpu":
        return {"reference": reference, "cpu": cpu}
    from dropit.ops import triton

    return {"reference": reference, "triton": triton}


def operations(x: torch.Tensor, gamma: float, ops: Any) -> dict[str, tuple[Callable[[], object], float]]:
    """By name: what to call, and the bytes that it reads and writes at least."""
    n, size = x.numel(), x.element_size()
    flat, layout = flatten(x)
    count = max(1, round(BLOCK * (1 - gamma)))
    layout = layout._replace(per_block=count)
    kept = n // BLOCK * count
    packed_bytes = kept * size + positions_nbytes(n, kept, count)
    packed = reference.pack_largest(flat, BLOCK, count, 0, layout)
    found: dict[str, tuple[Callable[[], object], float]] = {
        "pack": (lambda: ops.pack_largest(flat, BLOCK, count, 0, layout), n * size + packed_bytes),
        "unpack": (lambda: ops.unpack(packed), n * size + packed_bytes),
    }
    marks = reference.range_bitmask(flat, 0.0, float("inf"))
    found["mark what a ReLU passes"] = (lambda: ops.range_bitmask(flat, 0.0, float("inf")), n * size + marks.nbytes)
    found["keep what is marked"] = (lambda: ops.apply_bitmask(flat, marks), 2 * n * size + marks.nbytes)
    for bits in (8, 4):
        steps, scales = reference.quantize(flat, bits)
        small = steps.nbytes + scales.nbytes
        found[f"quantize, {bits} bits"] = (lambda bits=bits: ops.quantize(flat, bits), n * size + small)
        found[f"dequantize, {bits} bits"] = (
            lambda steps=steps, scales=scales: ops.dequantize(steps, scales, x.dtype, n),
            n * size + small,
        )
    return found


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """The median over ``repeats``, after a warm-up."""
    times = []
    for turn in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print the table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, help="elements, a multiple of 256 (default: 2^22, on a GPU 2^27)")
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="a small tensor, to see that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = args.numel or (2**18 if args.quick else 2**27 if device == "cuda" else 2**22)
    repeats = 3 if args.quick else args.repeats
    print(f"{n} elements, gamma {args.gamma}; {report.hardware()}\n")
    header = ["operation", "dtype", "by", "ns per 1000 elements", "GB/s", "of a copy's"]
    records, rows = [], []
    print(report.table(header, []), flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, device=device).to(dtype)
        copy = seconds(x.clone, repeats, device)
        found = [("copy", "torch", copy, 2.0 * x.nbytes)]
        topk = seconds(lambda x=x: x.abs().topk(round(n * (1 - args.gamma)), sorted=False), min(repeats, 5), device)
        found.append(("topk", "torch", topk, float(x.nbytes)))
        for by, ops in implementations(device).items():
            for name, (call, nbytes) in operations(x, args.gamma, ops).items():
                found.append((name, by, seconds(call, repeats, device), nbytes))
        for name, by, time_, nbytes in found:
            rate = nbytes / time_ / 1e9
            part = rate / (2.0 * x.nbytes / copy / 1e9)
            kind = str(dtype).removeprefix("torch.")
            records.append(
                {"operation": name, "dtype": kind, "by": by, "seconds": time_, "gb_per_s": rate, "of_copy": part}
            )
            rows.append([name, kind, by, f"{time_ / n * 1e12:.3g}", f"{rate:.3g}", f"{part:.0%}"])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    report.write(args.output, f"ops-{device}", records, report.table(header, rows))


if __name__ == "__main__":
    main()
