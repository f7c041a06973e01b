import os
import signal
from pathlib import Path

import pytest
import torch

import train
from dropit.training.model.classifier import Classifier


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("hook", "taken"), [("training_step", 1), ("training_step", 8), ("validation_step", 8)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, capsys, monkeypatch, hook, taken, signum):
    """In mid-epoch, at an epoch's end, in an evaluation; with dropout, augmentation, averages, a random strategy."""
    noise = ["MODEL.DROPOUT", "0.2", "TRAIN.FLIP", "true", "TRAIN.ERASING", "0.5", "DROPIT.STRATEGY", "random"]
    arguments = ["--cfg", config, "SOLVER.BATCH_SIZE", "10", "SOLVER.MAX_EPOCHS", "3", "SOLVER.EMA", "0.9", *noise]
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
    last = "other/few/vit/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == taken
    monkeypatch.undo()
    monkeypatch.chdir(Path(config).parents[2])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"train.py: stopped by {signum.name}; --resume goes on from {Path(last)}"
    assert train.main([*arguments, "OUTPUT_DIR", "other", "--resume"]) == 0
    whole, resumed = (torch.load(path, weights_only=True) for path in (last.replace("other", "outputs"), last))
    assert resumed["global_step"] == whole["global_step"] == 12
    for part in ("state_dict", "current_model_state"):
        for name, weight in whole[part].items():
            assert torch.equal(resumed[part][name], weight), name


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
