"""What a shell sees of train.py: Ctrl-C at any time, a closed standard output, nonsense on the command line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from dropit.training.model.classifier import Classifier
from tests import processes
from tests.training.outcome import failure

ROOT = Path(__file__).parents[3]


def command(config, *arguments):
    return [sys.executable, str(ROOT / "train.py"), "--cfg", config, *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval", "info", "time"])
@pytest.mark.parametrize("seconds", [0.3, 1.5, 4.0])
def test_ctrl_c_is_one_line_whenever_it_comes(config, mode, seconds):
    """While modules are imported, data and model are built, a mode runs."""
    arguments = command(config, "--mode", mode, "SOLVER.MAX_EPOCHS", "1000", "DATALOADER.NUM_WORKERS", "2")
    with processes.started(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        ended = process.poll() is not None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
        said = process.communicate()[1]
    if not ended and not (mode == "eval" and process.returncode == 1):  # it had found no checkpoint
        assert process.returncode == 130, said
        assert said.count("\n") == 1, said
        assert said.startswith("train.py: stopped by SIGINT"), said


@pytest.mark.slow
def test_a_closed_standard_output_is_one_line(config):
    """As of a pipe whose reader has ended."""
    with processes.started(
        command(config, "--mode", "info"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 1
    assert said == "train.py: standard output was closed, which this writes to\n"


def test_an_option_twice_is_refused(config, capsys):
    code, line = failure(capsys, "--cfg", config, "--cfg", "other.yaml")
    assert code == 2
    assert line == f"train.py: --cfg is given twice: {config} and other.yaml\n"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("OUTPUT_DIR", "a\0b", "OUTPUT_DIR must be a path, got 'a\\x00b' (command line)"),
        ("OUTPUT_DIR", "a\ud800b", "OUTPUT_DIR must be a path"),
        ("OUTPUT_DIR", "$DROPIT_IS_NOT_SET/x", "OUTPUT_DIR: $DROPIT_IS_NOT_SET is not set in the environment"),
        ("TRAIN.PATH", "x" * 5000, "File name too long"),
        ("VAL.PATH", "~nobody-of-this-name/x", "VAL.PATH ~nobody-of-this-name/x is not a directory"),
        ("CKPT", "x" * 5000, "File name too long"),
        ("SOLVER.LR", "1e300", "SOLVER.LR must be above 0, and of float32's range, got 1e+300"),
        ("SOLVER.MILESTONES", "[-1]", "SOLVER.MILESTONES must be increasing epochs, from 1 on, got [-1]"),
        ("SOLVER.MILESTONES", "[" * 5000, "SOLVER.MILESTONES: cannot read"),
        ("DROPIT.SKIP", "encoder.layer.*", "DROPIT.SKIP 'encoder.layer.*' names no layer; did you mean encoder.layers"),
    ],
)
def test_nonsense_is_one_line(config, capsys, key, value, says):
    resumes = ["--resume"] if key == "CKPT" else []
    code, line = failure(capsys, "--cfg", config, key, value, *resumes)
    assert code in (1, 2)
    assert says in line
    assert len(line) < 6000


def test_a_deeply_nested_file_is_one_line(tmp_path, capsys):
    (tmp_path / "deep.yaml").write_text("SOLVER: " + "[" * 10_000)
    assert failure(capsys, "--cfg", str(tmp_path / "deep.yaml"))[1].endswith("deep.yaml: nested too deep\n")


def test_home_and_variables_are_expanded(config, monkeypatch):
    monkeypatch.setenv("RUNS", str(Path.cwd() / "runs"))
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1", "OUTPUT_DIR", "$RUNS/mine"]) == 0
    assert len(list(Path("runs/mine/few/vit/version_0").rglob("*.ckpt"))) == 2
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["SOLVER.WARMUP_EPOCHS", "9"], "SOLVER.WARMUP_EPOCHS 9 outlasts SOLVER.MAX_EPOCHS 3"),
        (["MODEL.NUM_CLASSES", "12"], "MODEL.NUM_CLASSES is 12, but the data has 10 classes"),
        (["SOLVER.BATCH_SIZE", "80"], "SOLVER.BATCH_SIZE is 80, but there are 40 training images"),
    ],
)
def test_what_is_hardly_meant_is_said(config, capsys, overrides, says):
    assert train.main(["--cfg", config, "TRY_STEPS", "1", *overrides]) == 0
    assert f"train.py: warning: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_transform_is_named(config, capsys, monkeypatch, workers):
    monkeypatch.setattr("torchvision.transforms.v2.Resize.forward", lambda *_: 1 / 0)
    code, line = failure(capsys, "--cfg", config, "DATALOADER.NUM_WORKERS", str(workers))
    assert code == 1
    assert ".png" in line
    assert "Resize fails on an image of 32 x 32 (ZeroDivisionError: division by zero)" in line


@pytest.fixture
def to_loaders(monkeypatch):
    """Sends a signal to the loader processes when the fourth step begins."""
    real = Classifier.training_step

    def send(signum):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signum)
            return real(self, batch, batch_idx)

        monkeypatch.setattr(Classifier, "training_step", training_step)

    return send


LOADED = ["DATALOADER.NUM_WORKERS", "2", "SOLVER.BATCH_SIZE", "5", "SOLVER.MAX_EPOCHS", "50"]


def test_a_loader_process_that_ends_is_one_line(config, capsys, to_loaders):
    to_loaders(signal.SIGKILL)
    code, line = failure(capsys, "--cfg", config, *LOADED)
    assert code == 1
    assert "a loader process was ended" in line
    assert "--resume goes on from " in line


def test_a_loader_process_that_does_not_answer_is_given_up(config, capsys, to_loaders):
    to_loaders(signal.SIGSTOP)
    code, line = failure(capsys, "--cfg", config, *LOADED, "DATALOADER.TIMEOUT", "0.2")
    assert code == 1
    assert "no loader process has sent a batch within DATALOADER.TIMEOUT" in line
    assert "--resume goes on from " in line
