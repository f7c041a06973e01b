"""What a benchmark's result is written as: Markdown and JSON, with the hardware, the versions and the command."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Where and with what a benchmark runs."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *map(_without_place, sys.argv)]),
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30)}
    return found


def hardware() -> str:
    """In a line."""
    where = environment()
    device = f"{where['gpu']}, " if "gpu" in where else ""
    return f"{device}{where['cpu']}, {where['threads']} threads; torch {where['torch']}"


def write(directory: str | None, name: str, records: list[dict[str, Any]], markdown: str) -> None:
    """To ``directory``, if there is one: ``<date>-<name>.json`` and ``.md``."""
    if directory is None:
        return
    where = environment()
    stem = Path(directory, f"{where['date']}-{name}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"environment": where, "records": records}, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in where.items())
    stem.with_suffix(".md").write_text(f"# {name}\n\n{facts}\n\n{markdown}\n")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and half the width of its 95 % confidence interval, by Student's t."""
    from scipy.stats import t

    return mean(values), t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else f"|{'|'.join(line)}|" for line in lines)


def _without_place(argument: str) -> str:
    """Return an absolute path's last part: where the rest is says nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
