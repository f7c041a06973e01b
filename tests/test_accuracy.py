"""The program that trains a study: which runs it takes, what it makes of their results, and that it can be stopped."""

import json
import math
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dropit.training.config.check import ineffective
from dropit.training.config.load import load
from tests import processes

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "benchmarks" / "accuracy.py")
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
STUDY = """\
title: A study
config: configs/digits/resnet_tiny.yaml
overrides: {SOLVER.MAX_EPOCHS: 2, ACCELERATOR: cpu}
seeds: [1, 2]
arms:
  plain:
  int8: {MODEL.DROPIT: true, DROPIT.GAMMA: 0, DROPIT.COMPRESS: int8}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "small.yaml").write_text(STUDY)
    return tmp_path / "small.yaml"


def command(study, *options):
    where = ["--output", str(study.parent / "results"), "--work", str(study.parent / "work")]
    return [sys.executable, PROGRAM, str(study), *where, *options]


def record(arm, seed, accuracy, cache):
    final = {
        "val/acc1": accuracy,
        "train/loss": 1.0,
        "dropit/cache_mb": cache,
        "dropit/dense_mb": 10.0,
    }
    environment = {"cpu": "a processor", "torch": "2", "date": "2026-01-01", "commit": "abc"}
    curves = {"val/acc1": [[10, accuracy / 2], [20, accuracy]]}
    return {"arm": arm, "seed": seed, "final": final, "curves": curves, "environment": environment}


def test_the_table_has_the_paired_difference_with_its_interval(study):
    results = study.parent / "results" / "small"
    results.mkdir(parents=True)
    for arm, seed, accuracy, cache in (
        ("plain", 1, 0.50, 10.0),
        ("plain", 2, 0.60, 10.0),
        ("int8", 1, 0.52, 2.0),
        ("int8", 2, 0.61, 2.0),
    ):
        (results / f"{arm}-seed{seed}.json").write_text(json.dumps(record(arm, seed, accuracy, cache)))
    done = processes.run(command(study, "--report"), check=True)
    half = 12.706 * math.sqrt(0.5) / math.sqrt(2)  # of one degree of freedom; the differences are 2 and 1
    row = next(line for line in done.stdout.splitlines() if line.startswith("| int8"))
    assert row.split(" | ")[1:] == ["2", "56.50", f"+1.50 ± {half:.2f}", "1.000", "2.0 (-80 %) |"]
    assert done.stdout.strip() in (results / "table.md").read_text()
    assert "<svg" in (results / "plot.svg").read_text()


def test_a_study_without_a_plain_arm_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text(STUDY.replace("  plain:\n", ""))
    done = processes.run(command(tmp_path / "bad.yaml"), check=False)
    assert done.returncode == 2
    assert "arms has no 'plain'" in done.stderr


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_arm_of_a_study_is_a_config_that_loads(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = import_module("accuracy").Study.read(path)
    runs = list(study.runs())
    assert len(runs) == len(study.arms) * len(study.seeds)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        cfg = load(ROOT / study.config, [word for pair in run.overrides for word in pair])
        assert not ineffective(cfg)
        assert (run.arm != "plain") == cfg.MODEL.DROPIT


@pytest.mark.slow
def test_a_run_gives_its_numbers_again_and_one_that_is_done_is_not_run_again(study):
    options = ("--seeds", "1", "--arms", "int8", "plain", "--processes", "2")
    done = processes.run(command(study, *options), check=True)
    assert "2 runs, 0 of them done" in done.stdout
    path = study.parent / "results" / "small" / "int8-seed1.json"
    first = json.loads(path.read_text())
    again = processes.run(command(study, *options), check=True)
    assert "2 runs, 2 of them done" in again.stdout
    path.unlink()
    killed = study.parent / "work" / "small" / "int8-seed1" / "digits" / "resnet_tiny" / "version_0"
    killed.mkdir(parents=True)  # in its first epoch
    processes.run(command(study, *options), check=True)
    second = json.loads(path.read_text())
    for result in (first, second):
        del result["final"]["train/samples_per_sec"], result["environment"]
    assert first == second


@pytest.mark.slow
def test_every_arm_learns_the_digits(tmp_path):
    program = [sys.executable, PROGRAM, str(ROOT / "benchmarks" / "studies" / "digits_resnet.yaml"), "--seeds", "3"]
    where = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    done = processes.run([*program, *where, "--processes", "2"], check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    assert min(float(cells[2]) for cells in rows) > 90


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_from_the_last_epoch(study):
    study.write_text(STUDY.replace("MAX_EPOCHS: 2", "MAX_EPOCHS: 8"))
    options = ("--seeds", "1", "--arms", "plain")
    processes.run(command(study, *options), check=True)
    path = study.parent / "results" / "small" / "plain-seed1.json"
    expected = json.loads(path.read_text())["curves"]
    path.unlink()
    with processes.started(command(study, *options)) as running:
        _wait_for(study.parent / "work", "last.ckpt", running)
        os.kill(running.pid, signal.SIGTERM)
        running.wait(120)
    assert not path.is_file()
    processes.run(command(study, *options), check=True)
    assert json.loads(path.read_text())["curves"]["val/acc1"] == expected["val/acc1"]


def _wait_for(directory, name, process):
    for _ in range(600):
        if any(directory.rglob(name)):
            return
        assert process.poll() is None
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"no {name} in two minutes")
