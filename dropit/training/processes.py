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
    """How many processes torchrun or srun started together with this one; None where neither did."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment().world_size()
    return int(os.environ["SLURM_NTASKS"]) if SLURMEnvironment.detect() and "SLURM_NTASKS" in os.environ else None


def take_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """Those that this process started. Lightning, which would kill this one when one of them ends, lets go of them."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    taken = list(launcher.procs)
    launcher.procs.clear()  # which its observer looks at
    return taken


def end_others(trainer: Trainer, error: Exception) -> None:
    """End the processes that this one started: they would wait for it, on GPUs for half an hour.

    Where it fails because one of them did, that is what there is to say. Raises SetupError or SystemExit then.
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
        raise SystemExit(max(ended.values())) from error  # it has said why
