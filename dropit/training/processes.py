"""The processes of a run: how many were started, and how they end together."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from time import monotonic

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from dropit.training.errors import SetupError, UserError


def started_processes() -> int | None:
    """Return how many processes torchrun or srun started, this one included; None if neither did."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment().world_size()
    return int(os.environ["SLURM_NTASKS"]) if SLURMEnvironment.detect() and "SLURM_NTASKS" in os.environ else None


def take_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes that this one started, and remove them from Lightning, which kills this one if one ends."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    taken = list(launcher.procs)
    launcher.procs.clear()  # its observer watches this list
    return taken


def is_of_lost_peer(error: BaseException) -> bool:
    """Return whether the error is of a connection to another process of the run, which that has closed."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("connection reset by peer" in text or "connection closed by" in text)


def end_others(trainer: Trainer, error: Exception) -> None:
    """End the processes that this one started, which would wait for it, on GPUs for half an hour.

    Raises SetupError or SystemExit if one of them failed first: then that is the error to report.
    """
    others = take_processes(trainer)
    deadline = monotonic() + (0 if isinstance(error, UserError) else 1)
    ended = {}
    for rank, process in enumerate(others, start=1):
        with suppress(subprocess.TimeoutExpired):
            ended[rank] = process.wait(max(0, deadline - monotonic()))
    for process in others:
        process.kill()
    for rank, code in ended.items():
        if code < 0:
            raise SetupError(
                f"process {rank} of {trainer.world_size} was ended by {signal.Signals(-code).name}"
            ) from error
    if any(ended.values()):
        raise SystemExit(max(ended.values())) from error  # it has printed why
