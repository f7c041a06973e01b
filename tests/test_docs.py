"""Every command and example of the README is run here, shortened where it would take long or needs hardware or data."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dropit import STRATEGIES
from dropit.layers import SWAPS
from tests import processes

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") + blocks("shell") for line in block.splitlines()]
COMMANDS += re.findall(r"`(python [^`]+)`", TEXT)
MAIN_JOB, TESTS = (block.strip() for block in blocks("sh"))
TRAIN = list(dict.fromkeys(f"python train.py{c.partition('python train.py')[2]}" for c in COMMANDS if "train.py" in c))
OFFLINE = {"cifar100", "imagenet"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory with the repository's configs and benchmarks, and outputs of its own."""
    for name in ("configs", "benchmarks", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_commands_do_all_the_setup():
    assert MAIN_JOB.startswith('pip install -e ".[digits]" && python train.py --cfg configs/digits/')
    assert TESTS == 'pip install -e ".[dev]" && pytest'
    assert len(TRAIN) == 9


def test_the_train_commands_run_as_typed_one_after_the_other(workplace):
    """On digits, an epoch each: a later one resumes or evaluates what an earlier one wrote."""
    digits = [command for command in TRAIN if "configs/digits" in command]
    assert len(digits) == 6
    for command in digits:
        arguments = shlex.split(command)[2:]
        shorter = ["SOLVER.MAX_EPOCHS", "2" if "--resume" in arguments else "1"]
        if "--mode" in arguments:
            shorter = ["TRY_STEPS", "1"] if "time" in arguments else []
        assert train.main([*arguments, *shorter]) == 0


def test_the_examples_are_all_there():
    """Each is run by a test of its own."""
    shown = {command.split()[1] for command in COMMANDS if command.startswith("python examples/")}
    assert shown == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("command", [c for c in TRAIN if "--mode info" in c])
def test_info_answers_without_the_data(workplace, command):
    done = processes.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert "converted 112 of 112" in done.stdout
    assert "predicted peak of a step" in done.stdout


@pytest.mark.parametrize(
    "command", [c for c in TRAIN if any(f"configs/{data}" in c for data in OFFLINE) and "--mode info" not in c]
)
def test_without_the_data_or_the_gpus_one_line_says_what_is_missing(workplace, monkeypatch, capsys, command):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert train.main(shlex.split(command)[2:]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "NUM_GPUS 2, but this machine has 0" in line or "DATASET cifar100 is not in data" in line


@pytest.mark.parametrize("block", blocks("python"))
def test_the_examples_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_walk_through_of_contributing_runs():
    strategies, swaps = dict(STRATEGIES), dict(SWAPS)
    names = {}
    try:
        for block in blocks("python", (ROOT / "CONTRIBUTING.md").read_text()):
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    finally:
        for table, before in ((STRATEGIES, strategies), (SWAPS, swaps)):
            table.clear()
            table.update(before)
    assert "DropITWeighted" in names


@pytest.mark.parametrize(("benchmark", "rows"), [("memory", 6), ("architectures", 31)])
@pytest.mark.slow
def test_the_tables_are_what_the_benchmarks_print(workplace, benchmark, rows):
    assert f"python benchmarks/{benchmark}.py" in COMMANDS
    command = [sys.executable, f"benchmarks/{benchmark}.py"]
    done = processes.run(command, check=True)
    _, _, table = done.stdout.partition("\n\n")
    assert len(table.splitlines()) == rows + 2
    assert table in TEXT


@pytest.mark.parametrize(
    ("benchmark", "columns", "rows"),
    [("step", 7, 1), ("ops", 6, 36), ("error", 7, 2), ("budget", 8, 2)],
)
def test_the_benchmarks_run(workplace, benchmark, columns, rows):
    assert f"python benchmarks/{benchmark}.py" in COMMANDS
    command = [sys.executable, f"benchmarks/{benchmark}.py", "--quick"]
    done = processes.run(command, check=True)
    table = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == rows + 2
    assert {len(line) for line in table} == {columns}


@pytest.mark.slow
def test_everything_runs_and_leaves_its_results(workplace):
    assert {"python benchmarks/everything.py", "python benchmarks/batch.py"} <= set(COMMANDS)
    command = [sys.executable, "benchmarks/everything.py", "--quick", "--output", str(workplace / "results")]
    processes.run(command, check=True)
    kinds = {path.stem[11:].partition("-")[0] for path in (workplace / "results").iterdir()}
    assert {"ops", "step", "batch", "memory"} <= kinds


@pytest.mark.slow
def test_the_accuracy_benchmark_runs(workplace):
    assert "python benchmarks/digits.py" in COMMANDS
    done = processes.run([sys.executable, "benchmarks/digits.py", "--seeds", "3"], check=True)
    accuracies = [float(line.split("|")[2].split()[0]) for line in done.stdout.splitlines()[2:]]
    assert len(accuracies) == 6
    assert min(accuracies) > 0.9


@pytest.mark.slow
def test_the_main_job_reaches_its_accuracy_and_logs_its_scalars(workplace):
    command = MAIN_JOB.partition("&& ")[2].split()
    done = processes.run([sys.executable, *command[1:]], check=True)
    log = EventAccumulator("outputs/digits/vit_tiny_fastminkx0.9/version_0")
    log.Reload()
    last = {tag: log.Scalars(tag)[-1].value for tag in log.Tags()["scalars"]}
    assert last["val/acc1"] >= 0.93
    assert {"val/acc5", "train/loss", "lr-SGD", "dropit/dense_mb", "dropit/cache_mb"} <= last.keys()
    assert last["dropit/cache_ratio"] < 0.75
    assert "MiB held for backward" in done.stdout


def test_what_is_promised_names_tests_that_are_there():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).is_file()]
