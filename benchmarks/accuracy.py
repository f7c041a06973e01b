"""Accuracy against bytes: trains every arm of a study with every seed by train.py, and compares each arm with plain.

    python benchmarks/accuracy.py benchmarks/studies/digits_vit.yaml [--data DIR] [--processes 1] [--threads 1]
                                  [--arms plain int8] [--seeds 1 2] [--output DIRECTORY] [--work DIRECTORY] [--report]

A study is a config, overrides of its keys, seeds, and arms: overrides again, compared with the arm ``plain``. Runs with
the same seed start from the same weights and see the same images in the same order with the same augmentation, so their
difference is that of the arm. Each finished run is one JSON file; what is there is not run again, and a run that was
stopped goes on from its last epoch, from what it left in ``--work``. After each run the report is written again: a
table, a plot of accuracy against cache, and the curves. ``--data`` has the image folders train/ and val/, for a study
whose data is not downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from report import environment, interval, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
PLAIN = "plain"
CURVES = ("train/loss", "val/loss", "val/acc1")


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    seed: int
    overrides: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """Return the name of its result: int8-gamma-0.9-seed1."""
        return f"{re.sub(r'[^a-z0-9.]+', '-', self.arm.lower()).strip('-')}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What a file of benchmarks/studies says."""

    name: str
    title: str
    config: str
    overrides: Mapping[str, Any]
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read the file; raises ValueError for a study without a plain arm."""
        found = yaml.safe_load(path.read_text())
        if PLAIN not in found["arms"]:
            raise ValueError(f"{path}: arms has no {PLAIN!r}, with which the others are compared")
        arms = {arm: overrides or {} for arm, overrides in found["arms"].items()}
        return cls(
            path.stem, found["title"], found["config"], found.get("overrides") or {}, tuple(found["seeds"]), arms
        )

    def runs(self, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> Iterator[Run]:
        """Yield the runs, all arms of a seed before the next seed: an interrupted study has whole pairs."""
        for seed in self.seeds if seeds is None else seeds:
            for arm in self.arms if arms is None else arms:
                overrides = {**self.overrides, **self.arms[arm]}
                yield Run(arm, seed, tuple((key, str(value)) for key, value in overrides.items()))


class Trainings:
    """Runs train.py in processes of its own, which are stopped with this one."""

    def __init__(self, study: Study, output: Path, work: Path, data: Path | None, threads: int) -> None:
        self.study, self.output, self.work, self.threads = study, output, work, threads
        self.data = () if data is None else ("TRAIN.PATH", str(data / "train"), "VAL.PATH", str(data / "val"))
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the processes, which then save where they are, and start no more."""
        self._stopped.set()
        for process in tuple(self._running):
            process.terminate()

    def train(self, run: Run) -> dict[str, Any] | None:
        """Train, or go on with what was stopped. Returns the result, or None if it was stopped again."""
        directory = self.work / self.study.name / run.name
        resumed = any(directory.rglob("last.ckpt"))
        if not resumed:  # what is there is of a run that was killed in its first epoch
            shutil.rmtree(directory, ignore_errors=True)
        settings = [word for pair in run.overrides for word in pair]
        command = [sys.executable, str(ROOT / "train.py"), "--cfg", str(ROOT / self.study.config)]
        command += ["SEED", str(run.seed), "OUTPUT_DIR", str(directory), *self.data, *settings]
        if self._stopped.is_set():
            return None
        process = subprocess.Popen(
            [*command, *["--resume"] * resumed],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
        )
        self._running.add(process)
        _, errors = process.communicate()
        self._running.discard(process)
        if self._stopped.is_set():
            return None
        if process.returncode:
            raise RuntimeError(f"{run.name}: {errors.strip() or process.returncode}")
        return self._result(run, directory)

    def _result(self, run: Run, directory: Path) -> dict[str, Any]:
        """Return what TensorBoard's log says of the run, and write it to its file."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (log,) = directory.rglob("version_0")
        events = EventAccumulator(str(log), size_guidance={"scalars": 0})
        events.Reload()
        # As a dict: Lightning logs the last metrics twice, once beside the settings.
        curves = {
            tag: sorted({event.step: event.value for event in events.Scalars(tag)}.items())
            for tag in events.Tags()["scalars"]
        }
        epochs = len(curves["val/acc1"])
        last = [value for step, value in curves["train/loss"] if step >= (1 - 1 / epochs) * curves["val/acc1"][-1][0]]
        result = {
            "study": self.study.name,
            "arm": run.arm,
            "seed": run.seed,
            "config": self.study.config,
            "overrides": dict(run.overrides),
            "environment": {**environment(), "threads": self.threads},
            "final": {
                **{tag: values[-1][1] for tag, values in curves.items() if not tag.startswith("lr-")},
                "train/loss": sum(last) / len(last),
            },
            "curves": {tag: [(step, round(value, 5)) for step, value in curves[tag]] for tag in CURVES},
        }
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / f"{run.name}.json").write_text(json.dumps(result) + "\n")
        shutil.rmtree(directory)
        return result


def run_all(trainings: Trainings, runs: list[Run], processes: int) -> int:
    """Train what has no result yet, and write the report after each one. Returns how many failed."""
    missing = [run for run in runs if not (trainings.output / f"{run.name}.json").is_file()]
    print(f"{trainings.study.name}: {len(runs)} runs, {len(runs) - len(missing)} of them done", flush=True)
    failed, start = 0, time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        pending = {pool.submit(trainings.train, run): run for run in missing}
        for done, future in enumerate(as_completed(pending), 1):
            try:
                result = future.result()
            except RuntimeError as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
                continue
            if result is None:
                continue
            left = (time.monotonic() - start) / done * (len(missing) - done) / 60
            accuracy = result["final"]["val/acc1"]
            print(
                f"[{done}/{len(missing)}] {pending[future].name}: acc1 {accuracy:.4f}, {left:.0f} min left", flush=True
            )
            report(trainings.study, trainings.output)
    return failed


def report(study: Study, directory: Path) -> str:
    """Write the table and the plots of the runs that are done, and return the table."""
    records = [json.loads(path.read_text()) for path in sorted(directory.glob("*-seed*.json"))]
    arms = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in study.arms}
    arms = {arm: found for arm, found in arms.items() if found}
    if PLAIN not in arms:
        return ""
    text = _table(arms)
    where = sorted({_machine(record["environment"]) for record in records})
    settings = ", ".join(f"{key} {value}" for key, value in study.overrides.items())
    lines = [f"# {study.title}", f"`{study.config}`" + (f" with {settings}" if settings else ""), *where, text]
    (directory / "table.md").write_text("\n\n".join(lines) + "\n")
    _plot(study, arms, directory)
    return text


def _machine(where: dict[str, Any]) -> str:
    return f"{where.get('gpu') or where['cpu']}; torch {where['torch']}; {where['date']}; commit {where['commit']}"


def _table(arms: dict[str, dict[int, Any]]) -> str:
    rows = []
    plain = arms[PLAIN]
    for arm, found in arms.items():
        common = sorted(found.keys() & plain.keys())
        difference = saved = ""
        if arm != PLAIN and len(common) > 1:
            points = [100 * (_final(found[seed], "val/acc1") - _final(plain[seed], "val/acc1")) for seed in common]
            mean, half = interval(points)
            difference = f"{mean:+.2f} ± {half:.2f}"
        cache = _mean(found, "dropit/cache_mb")
        if arm != PLAIN:
            saved = f" ({100 * (cache / _mean(found, 'dropit/dense_mb') - 1):+.0f} %)"
        loss = f"{_mean(found, 'train/loss'):.3f}"
        accuracy = f"{100 * _mean(found, 'val/acc1'):.2f}"
        rows.append([arm, str(len(found)), accuracy, difference, loss, f"{cache:.1f}{saved}"])
    header = ["arm", "seeds", "acc1, %", "paired difference", "train loss, last epoch", "cache, MiB"]
    return table(header, rows)


def _final(record: dict[str, Any], tag: str) -> float:
    return record["final"][tag]  # type: ignore[no-any-return]


def _mean(found: dict[int, Any], tag: str) -> float:
    return sum(_final(record, tag) for record in found.values()) / len(found)


def _plot(study: Study, arms: dict[str, dict[int, Any]], directory: Path) -> None:
    """Draw accuracy against cache with the frontier, and validation accuracy over epochs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dropit"  # the same picture is the same file
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    points = {arm: (_mean(found, "dropit/cache_mb"), 100 * _mean(found, "val/acc1")) for arm, found in arms.items()}
    for index, (arm, (cache, accuracy)) in enumerate(points.items()):
        values = [100 * _final(record, "val/acc1") for record in arms[arm].values()]
        left.errorbar(cache, accuracy, interval(values)[1] if len(values) > 1 else None, fmt="o", color=f"C{index}")
        left.annotate(arm, (cache, accuracy), xytext=(5, 4), textcoords="offset points", fontsize=8)
        curves = [record["curves"]["val/acc1"] for record in arms[arm].values()]
        mean = [100 * sum(value for _, value in epoch) / len(epoch) for epoch in zip(*curves, strict=True)]
        right.plot(range(1, len(mean) + 1), mean, color=f"C{index}", label=arm)
    frontier = [
        point
        for point in sorted(points.values())
        if all(other[1] < point[1] for other in points.values() if other[0] < point[0])
    ]
    left.step(*zip(*frontier, strict=True), where="post", color="0.7", zorder=0)
    left.set(
        xlabel="cache, MiB", ylabel="validation accuracy, %", xlim=(0, None), title="mean and 95 % interval of each arm"
    )
    right.set(xlabel="epoch", ylabel="validation accuracy, %", title="mean over the seeds")
    right.legend(fontsize=8)
    figure.suptitle(study.title)
    figure.tight_layout()
    figure.savefig(directory / "plot.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Run the study; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a file of benchmarks/studies")
    parser.add_argument("--data", type=Path, help="directory of the image folders train/ and val/")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the study's")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results go to a directory in it")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "studies", help="where runs keep checkpoints")
    parser.add_argument("--report", action="store_true", help="write the report, and run nothing")
    args = parser.parse_args()
    try:
        study = Study.read(args.study)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        parser.error(f"{error}")
    if unknown := set(args.arms or ()) - set(study.arms):
        parser.error(f"{args.study}: arms are {', '.join(study.arms)}, got {', '.join(sorted(unknown))}")
    directory = args.output / study.name
    if args.report:
        print(report(study, directory))
        return 0
    trainings = Trainings(study, directory, args.work, args.data and args.data.resolve(), args.threads)
    signal.signal(signal.SIGTERM, lambda *_: trainings.stop())
    signal.signal(signal.SIGINT, lambda *_: trainings.stop())
    failed = run_all(trainings, list(study.runs(args.arms, args.seeds)), args.processes)
    print(report(study, directory))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
