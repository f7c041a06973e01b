import functools
import os
import signal
from pathlib import Path

import pytest
import torch

import train
from dropit.training.checkpoint.writer import CheckpointWriter
from dropit.training.data.samples import Samples
from dropit.training.errors import SetupError
from dropit.training.model.classifier import Classifier
from tests.training.outcome import assert_same_run, checkpoint, newest_version

NOISE = ["MODEL.DROPOUT", "0.2", "TRAIN.FLIP", "true", "TRAIN.ERASING", "0.5", "DROPIT.STRATEGY", "random"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("hook", "taken"),
    [("training_step", 1), ("training_step", 8), ("validation_step", 8), ("validation_step", 12)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, capsys, monkeypatch, hook, taken, signum):
    """In mid-epoch, at an epoch's end, in an evaluation; with dropout, augmentation, averages, a random strategy."""
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "10", "SOLVER.MAX_EPOCHS", "3", "SOLVER.EMA", "0.9", *NOISE]
    assert train.main(arguments) == 0
    real, before, sent = getattr(Classifier, hook), taken - (hook == "training_step"), []

    def stopped(self, batch, batch_idx):
        if not sent and self.trainer.global_step == before and (hook == "training_step" or batch_idx == 1):
            sent.append(os.kill(os.getpid(), signum))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, hook, stopped)
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "OUTPUT_DIR", "other"])
    assert ended.value.code == 128 + signum
    assert checkpoint("other")["global_step"] == taken
    monkeypatch.undo()
    monkeypatch.chdir(Path(config).parents[2])
    line = capsys.readouterr().err.splitlines()[-1]
    last = newest_version("other") / "checkpoints" / "last.ckpt"
    assert line == f"train.py: stopped by {signum.name}; --resume goes on from {last}"
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    assert "validation   acc1" in capsys.readouterr().out
    assert_same_run("outputs", "other")


@pytest.mark.parametrize("number", [3, 7, 8, 9])
@pytest.mark.parametrize("where", ["data", "step", "evaluation"])
def test_an_error_loses_no_step(config, monkeypatch, where, number):
    """Where a sample cannot be loaded, a step fails, or an evaluation."""
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "10", "SOLVER.EMA", "0.9", *NOISE]
    assert train.main(arguments) == 0
    kind, name = {
        "data": (Samples, "load"),
        "step": (Classifier, "training_step"),
        "evaluation": (Classifier, "validation_step"),
    }[where]
    real, calls = getattr(kind, name), []

    @functools.wraps(real)
    def failing(self, *given):
        calls.append(given)
        if len(calls) == number:
            raise SetupError("broken")
        return real(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, failing)
        assert train.main([*arguments, "OUTPUT_DIR", "other"]) == 1
    assert checkpoint("other")["global_step"] > 0
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    assert_same_run("outputs", "other")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["CHECKPOINT.EVERY_N_STEPS", "3"], [3, 6, 8]),
        (["CHECKPOINT.EVERY_MINUTES", "1e-9"], [1, 2, 3, 4, 5, 6, 7, 8]),
        (["CHECKPOINT.EVERY_MINUTES", "60"], [8]),
    ],
)
def test_a_checkpoint_is_written_every_so_many_steps_or_minutes(config, monkeypatch, given, expected):
    steps = []
    real = CheckpointWriter.save_checkpoint
    monkeypatch.setattr(
        CheckpointWriter,
        "save_checkpoint",
        lambda self, content, path, storage_options=None: (
            steps.append((content["global_step"], Path(path).name)),
            real(self, content, path),
        ),
    )
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "5", "SOLVER.MAX_EPOCHS", "1"]
    assert train.main([*arguments, *given]) == 0
    assert [step for step, name in steps if name == "last.ckpt"] == expected


def test_usr1_has_a_checkpoint_written_and_the_run_goes_on(config, monkeypatch):
    real = Classifier.training_step
    found = []

    def asked(self, batch, batch_idx):
        if self.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.trainer.global_step == 2:
            found.append(checkpoint("outputs")["global_step"])
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", asked)
    assert train.main(["--cfg", config, "SOLVER.BATCH_SIZE", "10", "SOLVER.MAX_EPOCHS", "1"]) == 0
    assert found == [2]
    assert checkpoint("outputs")["global_step"] == 4


def test_a_run_is_not_stopped_within_a_step(config, monkeypatch):
    """But after its last batch: what was accumulated of its gradient is in no checkpoint."""
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "20", "SOLVER.ACCUMULATE", "2", "SOLVER.MAX_EPOCHS", "2"]
    real, sent = Classifier.training_step, []

    def stopped(self, batch, batch_idx):
        if not sent and self.trainer.global_step == 2:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(self, batch, batch_idx)

    assert train.main(arguments) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "training_step", stopped)
        with pytest.raises(SystemExit):
            train.main([*arguments, "OUTPUT_DIR", "other"])
    last = Path("other/few/vit/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    whole = torch.load(Path("outputs", *last.parts[1:]), weights_only=True)["state_dict"]
    for name, weight in torch.load(last, weights_only=True)["state_dict"].items():
        assert torch.equal(weight, whole[name]), name


def test_a_try_that_is_stopped_writes_nothing(config, capsys, monkeypatch):
    monkeypatch.setattr(Classifier, "on_train_start", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train.main(["--cfg", config, "TRY_STEPS", "2"])
    assert capsys.readouterr().err == "train.py: stopped by SIGTERM; nothing was written\n"
    assert not list(Path("outputs").rglob("*.ckpt"))
