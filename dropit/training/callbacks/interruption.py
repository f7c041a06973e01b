"""Stop a run on a signal, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging

from dropit.training.processes import take_processes


class Interruption(SystemExit):
    """Raised when a run has stopped on a signal; the exit code is the shell's for that signal."""

    def __init__(self, signum: int, saved: Path | None) -> None:
        super().__init__(128 + signum)
        self.name, self.saved = signal.Signals(signum).name, saved


class Interruptions(Callback):
    """Stops a run on SIGTERM or SIGINT: after the current batch, with a checkpoint.

    A second signal ends the process at once. ``last``: the callback that knows the path of last.ckpt; None to write
    no checkpoint.
    """

    EVERY = 10  # steps from one exchange between several processes to the next

    def __init__(self, last: ModelCheckpoint | None) -> None:
        self._last = last
        self._signum = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which would end the run silently, with exit code 0."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal has come; not between the batches that accumulate to one step."""
        step, within = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if within and not trainer.is_last_batch:
            return
        if signum := self._signal(trainer, now=step % self.EVERY == 0 or trainer.is_last_batch):
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
        """Stop in an evaluation, with the weights that training had before it."""
        if signum := self._signal(trainer, now=batch_idx % self.EVERY == 0):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # the model has the average's weights during an evaluation
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._stop(trainer, signum)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers: Lightning calls no teardown here."""
        self._restore()

    def _remember(self, signum: int, frame: Any) -> None:
        self._signum = signum
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _signal(self, trainer: Trainer, *, now: bool) -> int:
        """Return the signal that any process got, or 0; several processes exchange it only if ``now``."""
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
        take_processes(trainer)
        raise Interruption(signum, path)
