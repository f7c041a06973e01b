import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dropit.training.checkpoint.files import find_damage
from tests import processes

ROOT = Path(__file__).parents[2]


@contextmanager
def two_processes(config):
    """In the second of a thousand epochs; they are ended whatever the test finds."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "NUM_GPUS", "2", "ACCELERATOR", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with processes.started([*command, "SOLVER.MAX_EPOCHS", "1000"], env=environment, **pipes) as run:
        assert any(line.startswith("epoch 2/") for line in run.stdout), run.stderr.read()
        yield run


@pytest.mark.ddp
def test_a_process_that_is_lost_ends_the_run_at_once_and_is_named(config):
    with two_processes(config) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        (other,) = (pid for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(other), signal.SIGKILL)
        _, errors = run.communicate()
    # Lightning looks every five seconds, and may be the first to see it.
    said = {1: "train.py: process 1 of 2 was ended by SIGKILL", -signal.SIGKILL: "terminated with code -9"}
    assert said[run.returncode] in errors.splitlines()[-1]
    assert not find_damage(Path("outputs/few/vit/version_0/checkpoints/last.ckpt"))


@pytest.mark.ddp
def test_two_processes_stop_together_when_one_is_asked_to(config):
    with two_processes(config) as run:
        run.terminate()
        _, errors = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    last = Path("outputs/few/vit/version_0/checkpoints/last.ckpt")
    assert errors.count(f"train.py: stopped by SIGTERM; --resume goes on from {last}") == 1
    assert 4 <= torch.load(last, weights_only=True)["global_step"] < 1000
