import sys
from pathlib import Path

import pytest
import torch

from dropit.training.model.classifier import Classifier
from tests import processes
from tests.training.outcome import failure

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [7, 8, 9])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(config, capsys, monkeypatch, step, bad):
    """In mid-epoch, at an epoch's end (four steps each) and at the next one's start."""
    real, taken = Classifier.training_step, set()

    def training_step(self, batch, batch_idx):
        taken.add(self.trainer.global_step + 1)
        return real(self, batch, batch_idx) * (bad if max(taken) == step else 1.0)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    code, line = failure(capsys, "--cfg", config, "SOLVER.BATCH_SIZE", "10")
    assert code == 1
    assert max(taken) <= step + 1  # found a step later, at most
    epoch, batch = divmod(step - 1, 4)
    assert f"the loss is {bad} at step {step}, batch {batch + 1} of 4 in epoch {epoch + 1}: a smaller" in line
    assert "outputs/few/vit/version_0/checkpoints holds the earlier best.ckpt and last.ckpt" in line
    kept = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == (step - 1) // 4 * 4
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(config, capsys, monkeypatch):
    """Where a finite loss left them."""

    def spoil(self, *_):
        if self.trainer.global_step == 4:
            self.model.heads.head.bias.data[0] = float("nan")

    monkeypatch.setattr(Classifier, "on_train_batch_end", spoil)
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert "a weight is no longer a finite number after step 4, batch 2 of 2 in epoch 2" in line
    kept = torch.load("outputs/few/vit/version_0/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2


@pytest.mark.ddp
def test_processes_whose_loss_is_not_finite_end_together_with_one_line(config):
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    done = processes.run([*command, "SOLVER.LR", "1e38"])
    assert done.returncode == 1
    assert done.stderr.count("SOLVER.CLIP_NORM") == 1
