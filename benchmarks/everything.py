"""Checks the kernels on this machine, then runs every benchmark, and writes all results to one directory.

    python benchmarks/everything.py [--output benchmarks/results] [--quick]

Made for a GPU that is lent for half an hour: what matters most comes first, each part has its own time limit, and one
that fails does not stop the others. Exit code 1 if one did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


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
    networks = ["--models", "resnet50", "vit_b_16"]
    others = ["--models", "resnet18_cifar", "convnext_tiny", "gpt2"]
    with_compiled = ["--methods", "compiled", "compiled, half", "compiled lossless", "compiled int8", "save_on_cpu"]
    found = [
        (300, [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops/test_triton.py"]),
        (120, [*bench, "benchmarks/ops.py", *where]),
        (240, [*bench, "benchmarks/step.py", *networks, "--autocast", *where]),
        (240, [*bench, "benchmarks/step.py", *networks, *where]),
        (240, [*bench, "benchmarks/memory.py", *where]),
        (240, [*bench, "benchmarks/memory.py", "--autocast", *where]),
        (240, [*bench, "benchmarks/step.py", *others, "--autocast", *where, "--name", "others"]),
        (420, [*bench, "benchmarks/batch.py", "--models", "vit_b_16", "resnet50", "--autocast", *where]),
        (600, [*bench, "benchmarks/step.py", *networks, "--autocast", *with_compiled, *where, "--name", "compiled"]),
    ]
    if torch.cuda.is_available():
        found.append((600, [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]))
    return found


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results", help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="each as small as it goes, to see that they run")
    args = parser.parse_args()
    failed = []
    for limit, command in parts(args.output, quick=args.quick):
        name = " ".join(command[1:])
        print(f"\n+ {name}", flush=True)
        start = time.perf_counter()
        try:
            code: int | str = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {limit} s"
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        if code:
            failed.append(f"{name}: {code}")
    print("\n" + "\n".join(failed or ["all of it ran"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
