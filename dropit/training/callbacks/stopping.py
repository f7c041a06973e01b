"""What ends a run before its time: a signal, or a loss that is no longer a number."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dropit.training.errors import SetupError, UserError


class Interruption(SystemExit):
    """A run that was asked to stop, and did; the exit code is the shell's for the signal."""

    def __init__(self, signum: int, saved: Path | None) -> None:
        super().__init__(128 + signum)
        self.name, self.saved = signal.Signals(signum).name, saved


class Interruptions(Callback):
    """Ends a run that SIGTERM or SIGINT asks to stop: after the batch at hand, with a checkpoint of that moment.

    A second signal ends it at once. ``last``: where the run's last.ckpt goes, if anywhere.
    """

    EVERY = 10  # steps, after which several processes ask each other

    def __init__(self, last: ModelCheckpoint | None) -> None:
        self._last = last
        self._signum = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, which would end a run without a word, and with exit code 0."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, if asked to; not between the batches that accumulate to one step."""
        step, within = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if within and not trainer.is_last_batch:
            return
        if signum := self._asked(trainer, now=step % self.EVERY == 0 or trainer.is_last_batch):
            self._stop(trainer, signum)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Or in an evaluation, with the weights that training had before it."""
        if signum := self._asked(trainer, now=batch_idx % self.EVERY == 0):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # it evaluates its average in the model's place
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._stop(trainer, signum)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end, which Lightning does not come to."""
        self._restore()

    def _note(self, signum: int, frame: Any) -> None:
        self._signum = signum
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _asked(self, trainer: Trainer, *, now: bool) -> int:
        """The signal that one of the processes got, if any; several ask each other, but only ``now``."""
        if trainer.world_size == 1:
            return self._signum
        if not now:
            return 0
        signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
        return int(trainer.strategy.all_gather(signum).max())

    def _stop(self, trainer: Trainer, signum: int) -> None:
        path = None
        if self._last is not None:
            path = Path(self._last.dirpath or ".", f"{self._last.filename}.ckpt")
            trainer.save_checkpoint(path)
        _take_processes(trainer)
        raise Interruption(signum, path)


def _take_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
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
    others = _take_processes(trainer)
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


class DivergedError(UserError):
    """The loss, or a weight, is infinite or no number: going on would train nothing."""


class FiniteLoss(Callback):
    """Ends a run whose loss is infinite or no number, and writes no checkpoint whose weights are not finite.

    The loss is looked at a step later, when it has been computed anyway, so that no GPU waits. ``last`` says
    where the run's checkpoints are.
    """

    def __init__(self, last: ModelCheckpoint) -> None:
        self._last = last
        self._loss: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._step = ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of the step before; keep this one's, of all processes together."""
        self._check(trainer)
        loss: Tensor = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")  # type: ignore[assignment]
        self._loss = loss.to("cpu", non_blocking=True)
        if loss.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._step = (
            f"step {trainer.global_step}, batch {batch_idx + 1} of {trainer.num_training_batches} in epoch "
            f"{trainer.current_epoch + 1}"
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step's, too."""
        self._check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before it is spent on an evaluation."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise instead of writing what cannot be gone on from."""
        self._check(trainer)
        if not trainer.strategy.reduce_boolean_decision(_is_finite(pl_module)):
            self._stop(trainer, f"a weight is no longer a finite number after {self._step}")

    def _check(self, trainer: Trainer) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        if self._loss is not None and not self._loss.isfinite():
            self._stop(trainer, f"the loss is {self._loss.item()} at {self._step}")

    def _stop(self, trainer: Trainer, what: str) -> None:
        self._loss = None
        if not trainer.is_global_zero:  # one process speaks for all
            raise SystemExit(0)
        directory = Path(self._last.dirpath or ".")
        kept = sorted(directory.glob("*.ckpt"))
        before = f"; {directory} holds the earlier {' and '.join(path.name for path in kept)}" if kept else ""
        raise DivergedError(f"{what}: a smaller SOLVER.LR, SOLVER.CLIP_NORM or SOLVER.WARMUP_EPOCHS may help{before}")


def _is_finite(module: nn.Module) -> bool:
    """Whether all parameters are, as far as this process has them."""
    parts = (parameter.detach() for parameter in module.parameters())
    local = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    return all(bool(part.isfinite().all()) for part in local)
