"""Accuracy and cache of the digits configs over several seeds: a table of docs/benchmarks.md.

    python benchmarks/digits.py [--seeds 42 1 2]

Runs train.py, each run in a process of its own, and reads its TensorBoard log.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "vit_tiny",
    "vit_tiny_fastminkx0.9",
    "vit_tiny_fastminkx0.9_int8",
    "resnet_tiny",
    "resnet_tiny_fastminkx0.8",
    "resnet_tiny_fastminkx0.8_int8",
)


def run(row: str, seed: int, output: str) -> dict[str, float]:
    """Train; returns the last value of each scalar."""
    config = ROOT / "configs" / "digits" / f"{row}.yaml"
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", str(config), "SEED", str(seed), "OUTPUT_DIR", output]
    subprocess.run(command, check=True, capture_output=True)
    newest = max(Path(output, "digits", row).glob("version_*"), key=lambda path: path.stat().st_mtime)
    log = EventAccumulator(str(newest))
    log.Reload()
    return {tag: log.Scalars(tag)[-1].value for tag in log.Tags()["scalars"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    seeds = parser.parse_args().seeds
    print("| config | val/acc1, mean (lowest to highest) | cache, MiB | plain, MiB |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as output:
        for row in ROWS:
            ends = [run(row, seed, output) for seed in seeds]
            acc = [end["val/acc1"] for end in ends]
            mean = f"{statistics.mean(acc):.4f} ({min(acc):.4f} to {max(acc):.4f})"
            print(
                f"| {row} | {mean} | {ends[0]['dropit/cache_mb']:.2f} | {ends[0]['dropit/dense_mb']:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
