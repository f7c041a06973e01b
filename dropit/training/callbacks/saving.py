"""When last.ckpt is written besides the ends of epochs, and how signals stop a run."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging

from dropit.training.callbacks.finite_loss import DivergedError
from dropit.training.checkpoint.keepers import RandomKeeper
from dropit.training.checkpoint.writer import CheckpointWriter
from dropit.training.processes import take_processes

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
SAVE = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Interruption(SystemExit):
    """Raised when a run has stopped on a signal; the exit code is the shell's for that signal."""

    def __init__(self, signum: int, saved: Path | None) -> None:
        super().__init__(128 + signum)
        self.name, self.saved = signal.Signals(signum).name, saved


class Saving(Callback):
    """Writes last.ckpt between two steps, and stops the run on a signal.

    It is written every ``every_steps`` steps and ``every_minutes`` minutes, if these are not 0; on a signal of SAVE,
    after which the run goes on; on one of STOP, which ends it; and on an exception in a run of one process. After an
    epoch's last step the run is stopped before the evaluation, if one is due, which a resumed run then does first, or
    else behind the epoch's own checkpoint. A second signal ends the process at once, but for a checkpoint that is
    being written, which is finished; a third one does not wait for that, either.

    ``last``: the callback that knows the path of last.ckpt; None to write none. ``random``: which keeps the generators'
    states.
    """

    EVERY = 10  # steps from one exchange between several processes to the next

    def __init__(
        self, last: ModelCheckpoint | None, random: RandomKeeper, *, every_steps: int = 0, every_minutes: float = 0
    ) -> None:
        self._last, self._random = last, random
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._signum = self._signals = 0
        self._asked = False  # to save and go on
        self._evaluates = False  # the averaged weights, if there are such
        self.saved: Path | None = None  # on an exception
        self.steps: int | None = None  # that this process has taken; None before training starts
        self._at_end: Path | None = None  # what the end of the epoch before was saved to
        self._written = 0.0  # when
        self._writer: Any = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which would end the run silently, with exit code 0."""
        self.steps, self._written, self._writer = 0, monotonic(), trainer.strategy.checkpoint_io
        if threading.current_thread() is threading.main_thread():
            handlers = {**dict.fromkeys(STOP, self._stop_later), **dict.fromkeys(SAVE, self._save_later)}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        if self._at_end is not None and (signum := _most(trainer, self._signum)):
            self._stop(trainer, signum, self._at_end)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop if it is time; not between the batches that accumulate to one step."""
        assert self.steps is not None
        step, within = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        self.steps += not within or trainer.is_last_batch
        if trainer.is_last_batch or within:
            return
        self._random.note(pl_module)
        counted = self._every_steps and trainer.global_step % self._every_steps == 0
        asked = signum = 0
        if trainer.world_size == 1 or step % self.EVERY == 0:
            late = self._every_seconds and monotonic() - self._written > self._every_seconds
            signum, asked = _most(trainer, self._signum), _most(trainer, bool(self._asked or late))
        if signum or asked or counted:
            self._asked = False
            path = self._write(trainer)
            if signum:
                self._stop(trainer, signum, path)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before an evaluation."""
        self._stop_evaluation(trainer)
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # of one that the run was resumed in

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
        if trainer.world_size == 1 or batch_idx % self.EVERY == 0:
            self._stop_evaluation(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model may have other weights now: those that are averaged."""
        self._evaluates = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It has its own again."""
        self._evaluates = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Behind this, the epoch's own checkpoint is written."""
        self._random.note(pl_module)
        self._at_end, self._written, self._asked = self._path(), monotonic(), False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what the last step gave, and restore the signal handlers: Lightning calls no teardown here."""
        self._restore()
        if not isinstance(exception, Exception) or isinstance(exception, DivergedError):
            return
        if self._last is None or trainer.world_size > 1 or not trainer.global_step:
            return
        try:
            if trainer.validating:
                self._leave_evaluation(trainer)
            elif _rewind(trainer):
                self._random.rewind()
            else:  # the end of the epoch before has been written, and nothing since
                self.saved = self._at_end
                return
            self.saved = self._write(trainer)
        except Exception:  # the first one is what the user is to read
            self.saved = None

    def _stop_later(self, signum: int, frame: Any) -> None:
        self._signals += 1
        self._signum = signum
        writing = isinstance(self._writer, CheckpointWriter) and self._writer.is_writing
        if self._signals > (2 if writing else 1):
            self._restore()
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _save_later(self, signum: int, frame: Any) -> None:
        self._asked = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop_evaluation(self, trainer: Trainer) -> None:
        if signum := _most(trainer, self._signum):
            self._leave_evaluation(trainer)
            self._stop(trainer, signum, self._write(trainer))

    def _leave_evaluation(self, trainer: Trainer) -> None:
        """Have weights and loops as they were when it was due: a resumed run then begins there."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self._evaluates and isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, trainer.lightning_module)
        progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        for counts in (progress.total, progress.current):
            counts.reset()
            counts.ready = counts.started = 1
        progress.is_last_batch = False

    def _path(self) -> Path | None:
        return None if self._last is None else Path(self._last.dirpath or ".", f"{self._last.filename}.ckpt")

    def _write(self, trainer: Trainer) -> Path | None:
        path = self._path()
        if path is not None:
            trainer.save_checkpoint(path)
            self._written = monotonic()
        return path

    def _stop(self, trainer: Trainer, signum: int, path: Path | None) -> None:
        take_processes(trainer)
        raise Interruption(signum, path)


def _most(trainer: Trainer, number: int) -> int:
    """Return the largest of the processes' numbers."""
    if trainer.world_size == 1:
        return int(number)
    mine = torch.tensor(int(number), device=trainer.strategy.root_device)
    return int(trainer.strategy.all_gather(mine).max())


def _rewind(trainer: Trainer) -> int:
    """Have the loops' and the loader's state say that the step that has failed was not begun.

    Returns the batches of the epoch that come before it.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    current, total = loop.batch_progress.current, loop.batch_progress.total
    excess = current.completed % trainer.accumulate_grad_batches
    current.completed -= excess
    total.completed -= excess
    for counts in (current, total):
        counts.ready = counts.started = counts.processed = counts.completed
    loop.batch_progress.is_last_batch = False
    loaders = trainer.fit_loop._combined_loader
    for loader in loaders.flattened if loaders is not None else ():
        loader.sampler.taken = current.completed
    return int(current.completed)
