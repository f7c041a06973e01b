"""End a run that a signal asks to stop, with a checkpoint."""

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
        take_processes(trainer)
        raise Interruption(signum, path)
