"""Runs that are stopped or killed at random moments, and resumed: nothing of them may be lost."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import train
from tests import processes
from tests.training.outcome import assert_same_run, checkpoint, newest_version

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "torch", "pytorch_lightning"])
COMMON = ["SOLVER.BATCH_SIZE", "10", "SOLVER.MAX_EPOCHS", "4", "TRAIN.FLIP", "true", "TRAIN.ERASING", "0.5"]
VARIANTS = {
    "dropout": ["MODEL.DROPOUT", "0.2"],
    "random": ["DROPIT.STRATEGY", "random"],
    "averaged, accumulated": ["SOLVER.EMA", "0.9", "SOLVER.ACCUMULATE", "2"],
    "mixed, augmented, loaded by others": [
        *["TRAIN.MIXUP", "0.4", "TRAIN.AUTO_AUGMENT", "randaugment", "DATALOADER.NUM_WORKERS", "2"]
    ],
    "every second epoch": ["CHECK_VAL_EVERY_N_EPOCH", "2", "MODEL.DROPOUT", "0.2"],
    "budget": ["DROPIT.BUDGET_MB", "1.5"],
}


def _run(arguments, place, log):
    os.chdir(place)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, train._quit)
    sys.exit(train.main(arguments))


class Run:
    """train.py in a process of its own, in the background."""

    started: ClassVar = []

    def __init__(self, config, output, *arguments):
        self.place, self.output, self.log = Path(config).parents[2], output, Path(f"{output}.log")
        command = ["--cfg", config, "OUTPUT_DIR", output, *COMMON, *arguments]
        self.process = _context.Process(target=_run, args=(command, self.place, self.place / self.log))
        self.process.start()
        self.started.append(self.process)

    def wait_for_logs(self):
        """Until training is about to start."""
        before = len(list((self.place / self.output).rglob("events*")))
        while self.process.is_alive() and len(list((self.place / self.output).rglob("events*"))) == before:
            time.sleep(0.01)

    def end(self, signum=None):
        """The exit code, after a signal if it still runs."""
        if signum is not None and self.process.is_alive():
            os.kill(self.process.pid, signum)
        self.process.join(120)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode


@pytest.fixture(autouse=True)
def nothing_left():
    """Ends what a failed test has left running."""
    yield
    while Run.started:
        Run.started.pop().kill()


def resume(config, output, *arguments):
    """To the end; one that was stopped before there was a checkpoint begins anew."""
    saved = list(Path(output).rglob("last.ckpt"))
    code = Run(config, output, *arguments, *["--resume"] * bool(saved)).end()
    assert code == 0, Path(f"{output}.log").read_text()


@pytest.fixture
def uninterrupted(config):
    """Run it whole; the seconds from its first log on."""

    def run(*arguments):
        whole = Run(config, "whole", *arguments)
        whole.wait_for_logs()
        began = time.monotonic()
        assert whole.end() == 0, Path("whole.log").read_text()
        return time.monotonic() - began

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_stopped_at_any_moment_goes_on_as_if_it_had_not_been(config, uninterrupted, variant):
    """By a signal, twice where the first resumed run is stopped as well."""
    arguments = VARIANTS[variant]
    seconds = uninterrupted(*arguments)
    moments = random.Random(variant)
    for number in range(10):
        output = f"stopped{number}"
        for _ in range(1 + number % 2):
            saved = list(Path(output).rglob("last.ckpt"))
            run = Run(config, output, *arguments, *["--resume"] * bool(saved))
            run.wait_for_logs()
            time.sleep(moments.uniform(0, seconds))
            signum = moments.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            assert run.end(signum) in (0, 128 + signum, -signum), Path(f"{output}.log").read_text()
        resume(config, output, *arguments)
        assert_same_run("whole", output)
        assert "Traceback" not in Path(f"{output}.log").read_text()


@pytest.mark.parametrize("variant", ["dropout", "averaged, accumulated"])
def test_a_run_that_is_killed_loses_no_more_than_the_steps_since_it_saved(config, uninterrupted, variant):
    arguments = [*VARIANTS[variant], "CHECKPOINT.EVERY_N_STEPS", "3"]
    seconds = uninterrupted(*arguments)
    moments = random.Random(variant)
    for number in range(20):
        output = f"killed{number}"
        run = Run(config, output, *arguments)
        run.wait_for_logs()
        time.sleep(moments.uniform(0, seconds))
        run.end(signal.SIGKILL)
        saved = list(Path(output).rglob("last.ckpt"))
        if saved:
            torch.load(saved[0], weights_only=True)
        resume(config, output, *arguments)
        assert_same_run("whole", output)
        assert not list(newest_version(output).rglob("*.part"))


@pytest.mark.ddp
@pytest.mark.parametrize(("parallel", "strategy"), [("ddp", "random"), ("fsdp", "fastmink")])
def test_each_of_two_processes_goes_on_with_its_own_random_numbers(config, parallel, strategy):
    """By train.py as it is started from a shell, stopped in mid-epoch and before an evaluation."""
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, *COMMON, "SOLVER.BATCH_SIZE", "4"]
    command += ["NUM_GPUS", "2", "ACCELERATOR", "cpu", "PARALLEL", parallel]
    command += ["MODEL.DROPOUT", "0.2", "DROPIT.STRATEGY", strategy, "SOLVER.MAX_EPOCHS", "8"]
    processes.run([*command, "OUTPUT_DIR", "whole"], check=True)
    stopped = [*command, "OUTPUT_DIR", "stopped"]
    steps = [0]
    for seconds in (0.5, 1.5, 2.5):
        events = len(list(Path("stopped").rglob("events*")))
        with processes.started(
            [*stopped, *["--resume"] * bool(steps[-1])], stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and len(list(Path("stopped").rglob("events*"))) == events:
                time.sleep(0.01)
            time.sleep(seconds)
            process.terminate()
            said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), said
        assert said.count("\n") <= 1, said
        if list(Path("stopped").rglob("last.ckpt")):
            steps.append(checkpoint("stopped")["global_step"])
    assert 0 < steps[1] < checkpoint("whole")["global_step"]
    processes.run([*stopped, "--resume"], check=True)
    assert_same_run("whole", "stopped")
    alone = processes.run(
        [*command, "OUTPUT_DIR", "stopped", "--resume", "NUM_GPUS", "1", "SOLVER.MAX_EPOCHS", "9"], check=True
    )
    assert "the checkpoint is of 2 processes, this run of 1" in alone.stderr
