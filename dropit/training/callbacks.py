"""What a run measures beside accuracy, and what it leaves in TensorBoard."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from dropit import CacheMeter, from_dropit

MIB = 2**20


class CacheMonitor(Callback):
    """Measures what the first batch of each epoch holds for backward, and what the plain model would hold.

    Logs dropit/cache_mb, dropit/dense_mb (MiB, of this process) and dropit/cache_ratio.
    """

    def __init__(self) -> None:
        self.cache_mb = self.dense_mb = float("nan")
        self._meter: CacheMeter | None = None
        self._dense_shape: torch.Size | None = None  # of the images that dense_mb is of

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before an epoch's first forward pass."""
        if batch_idx == 0:
            if batch[0].shape != self._dense_shape:  # what the plain model holds depends on nothing else
                self.dense_mb = _dense_bytes(trainer, pl_module, batch) / MIB
                self._dense_shape = batch[0].shape
            self._meter = CacheMeter(pl_module.model).__enter__()  # type: ignore[arg-type]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Between the forward and the backward pass: all that is held is held now."""
        if self._meter is None:
            return
        self._stop()
        pl_module.log("dropit/cache_mb", self.cache_mb, prog_bar=True, logger=False)
        if trainer.logger is not None:
            tags = {"cache_mb": self.cache_mb, "dense_mb": self.dense_mb, "cache_ratio": self.cache_ratio}
            trainer.logger.log_metrics({f"dropit/{tag}": value for tag, value in tags.items()}, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        if self._meter is not None:
            self._stop()

    @property
    def cache_ratio(self) -> float:
        """What is held, as a part of what the plain model would hold."""
        return self.cache_mb / self.dense_mb

    def _stop(self) -> None:
        assert self._meter is not None
        self._meter.__exit__()
        self.cache_mb = self._meter.total_bytes / MIB
        self._meter = None


def _dense_bytes(trainer: Trainer, pl_module: LightningModule, batch: tuple[Tensor, Tensor]) -> int:
    """What the plain model holds for this batch: a forward pass of a copy, which keeps nothing and changes nothing."""
    images, labels = batch
    with plain_copy(trainer, pl_module) as plain:
        with CacheMeter(plain, retain=False) as meter:
            loss = pl_module.criterion(plain(images), labels)  # type: ignore[operator]
        del loss
    return meter.total_bytes


@contextmanager
def plain_copy(trainer: Trainer, pl_module: LightningModule) -> Iterator[nn.Module]:
    """A copy of the model that drops nothing, to run in the trainer's precision; it draws the next step's numbers."""
    plain = from_dropit(copy.deepcopy(pl_module.model))  # type: ignore[arg-type]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
        yield plain


class SpeedMonitor(Callback):
    """Logs train/samples_per_sec of each epoch, over all processes, and on a GPU memory/peak_allocated_mb."""

    def __init__(self) -> None:
        self._epochs: list[float] = []
        self._samples = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._samples = 0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; stop the clock at the last batch, before validation."""
        self._samples += len(batch[0]) * trainer.world_size
        if not trainer.is_last_batch:
            return
        metrics = {}
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            metrics["memory/peak_allocated_mb"] = torch.cuda.max_memory_allocated() / MIB
        seconds = time.perf_counter() - self._start
        metrics["train/samples_per_sec"] = self._samples / seconds
        self._epochs.append(seconds / (batch_idx + 1))
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, trainer.global_step)

    @property
    def measured(self) -> bool:
        """Whether an epoch has ended."""
        return bool(self._epochs)

    @property
    def step_seconds(self) -> float:
        """Mean time of a step, data loading included; without the first epoch, which warms up, if there are others."""
        epochs = self._epochs[1:] or self._epochs
        return sum(epochs) / len(epochs)


class Dashboard(Callback):
    """TensorBoard's custom-scalars page, accuracy beside cache, and its hparams page, one row a run."""

    PAGE = {  # noqa: RUF012
        "DropIT": {
            "accuracy": ["Multiline", ["val/acc1"]],
            "cache, MiB": ["Multiline", ["dropit/cache_mb", "dropit/dense_mb"]],
        }
    }

    def __init__(self, hparams: dict[str, Any]) -> None:
        self._hparams = hparams

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out the page."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            trainer.logger.experiment.add_custom_scalars(self.PAGE)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row: what was chosen and what came out."""
        if isinstance(trainer.logger, TensorBoardLogger):
            wanted = ("val/acc1", "dropit/cache_mb")
            metrics = {tag: trainer.callback_metrics[tag] for tag in wanted if tag in trainer.callback_metrics}
            trainer.logger.log_hyperparams(self._hparams, metrics, trainer.global_step)


class EpochLines(Callback):
    """One line an epoch, for a log file, where a progress bar would be noise."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the newest of all that the progress bar would show."""
        if trainer.is_global_zero:
            metrics = ", ".join(f"{tag} {value:.4g}" for tag, value in trainer.progress_bar_metrics.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {metrics}", flush=True)
