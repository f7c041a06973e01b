"""Checks the kernels on this machine, then runs every benchmark, and writes all results to one directory.

    python benchmarks/everything.py [--output benchmarks/results] [--minutes 10] [--quick]

Made for a GPU that is lent for a quarter of an hour: what matters most comes first, each part has its own time limit,
and one that fails does not stop the others. When ``--minutes`` have passed the rest is named and left out. Exit code 1
if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST = 15  # seconds in which a part can come to something


def parts(output: str, *, quick: bool) -> list[tuple[int, list[str]]]:
    """Seconds at most, and the command."""
    bench = [sys.executable, "-W", "ignore"]
    where = ["--output", output]
    if quick:
        return [
            (600, [sys.executable, "-m", "pytest", "-q", "tests/ops", "-k", "narrower"]),
            *((600, [*bench, f"benchmarks/{name}.py", "--quick", *where]) for name in ("ops", "step", "batch")),
            (600, [*bench, "benchmarks/memory.py", "--models", "resnet18_cifar", *where]),
        ]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]
    half = ["--autocast", *where]
    compiled = ["--methods", "compiled", "compiled int8", "save_on_cpu", "--name", "compiled"]
    channels = ["--methods", "channels", "channels, int8", "--name", "channels"]
    return [
        (120, [*bench, "benchmarks/step.py", "--models", "resnet50", "vit_b_16", "gpt2", *half]),
        (150, [*tests, "tests/ops/test_triton.py", "tests/test_gpu.py", "-m", ""]),
        (60, [*bench, "benchmarks/ops.py", *where]),
        (90, [*bench, "benchmarks/step.py", "--models", "resnet50", "vit_b_16", "gpt2", *channels, *half]),
        (180, [*bench, "benchmarks/batch.py", "--models", "vit_b_16", *half]),
        (120, [*bench, "benchmarks/step.py", "--models", "resnet50", "vit_b_16", *where]),
        (120, [*bench, "benchmarks/step.py", "--models", "resnet18_cifar", "convnext_tiny", *half, "--name", "others"]),
        (240, [*bench, "benchmarks/step.py", "--models", "vit_b_16", *compiled, *half]),
        (240, [*bench, "benchmarks/memory.py", *half]),
        (240, [*bench, "benchmarks/memory.py", *where]),
    ]


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results", help="where to write the results")
    parser.add_argument("--minutes", type=float, default=10, help="when no more is begun, and what runs is ended")
    parser.add_argument("--quick", action="store_true", help="each as small as it goes, to see that they run")
    args = parser.parse_args()
    failed, left_out = [], []
    end = time.monotonic() + 60 * args.minutes
    for limit, command in parts(args.output, quick=args.quick):
        name = " ".join(command[1:])
        left = end - time.monotonic()
        if left < LEAST:
            left_out.append(f"{name}: left out")
            continue
        print(f"\n+ {name}", flush=True)
        start = time.perf_counter()
        try:
            code: int | str = subprocess.run(command, cwd=ROOT, timeout=min(limit, left), check=False).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {min(limit, left):.0f} s"
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            failed.append(f"{name}: {code}")
    print("\n" + "\n".join([*failed, *left_out] or ["all of it ran"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
