"""What a run measures besides accuracy, and what it writes to TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

import dropit

MIB = 2**20


class CacheMonitor(dropit.CacheMonitor):
    """The library's CacheMonitor, for several processes: logs the cache of each as dropit/cache_mb_process_N, and the
    largest as dropit/cache_max_mb.

    ``estimate``: returns the plain model's cache in bytes for images of a shape, where it cannot be measured.
    """

    def __init__(self, estimate: Callable[[Sequence[int]], int] | None = None) -> None:
        super().__init__()
        self._estimate = estimate

    def measure_dense(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> float:
        """Return the plain model's cache in MiB: the estimate, if there is one, or a measurement."""
        if self._estimate is None:
            return super().measure_dense(trainer, pl_module, batch, batch_idx)
        return self._estimate(batch[0].shape) / MIB

    def log_cache(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the cache of this process and, if there are others, of each."""
        super().log_cache(trainer, pl_module)
        if trainer.world_size == 1:
            return
        mine = torch.tensor(self.cache_mb, device=pl_module.device)
        each = trainer.strategy.all_gather(mine).flatten().tolist()
        tags = {f"dropit/cache_mb_process_{rank}": value for rank, value in enumerate(each)}
        for logger in trainer.loggers:
            logger.log_metrics({**tags, "dropit/cache_max_mb": max(each)}, self._step)


class SpeedMonitor(Callback):
    """Logs train/samples_per_sec of each epoch, over all processes, and on a GPU memory/peak_allocated_mb."""

    def __init__(self) -> None:
        self._epochs: list[float] = []
        self._samples = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the clock and the peak of memory."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._samples = 0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; stop the clock at the last batch, before validation."""
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
            trainer.logger.log_metrics(metrics, trainer.global_step - 1)  # of the step that has been taken

    @property
    def measured(self) -> bool:
        """Return whether an epoch has ended."""
        return bool(self._epochs)

    @property
    def step_seconds(self) -> float:
        """Return the mean time of a step with data loading; without the first epoch, a warm-up, if there are others."""
        epochs = self._epochs[1:] or self._epochs
        return sum(epochs) / len(epochs)


class Dashboard(Callback):
    """Fills TensorBoard's custom-scalars page, accuracy beside cache, and its hparams page, one row a run."""

    METRICS = ("val/acc1", "dropit/cache_mb")
    PAGE = {  # noqa: RUF012
        "DropIT": {
            "accuracy": ["Multiline", ["val/acc1"]],
            "cache, MiB": ["Multiline", ["dropit/cache_mb", "dropit/dense_mb"]],
        }
    }

    def __init__(self, settings: dict[str, Any]) -> None:
        self._hparams = settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout of the custom-scalars page, and the settings, beside which TensorBoard shows the metrics."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            board = trainer.logger.experiment
            board.add_custom_scalars(self.PAGE)
            for summary in hparams(self._hparams, dict.fromkeys(self.METRICS, 0.0)):
                board._get_file_writer().add_summary(summary)


class EpochLines(Callback):
    """Prints one line an epoch, for log files, in which a progress bar is noise."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the newest values of what the progress bar would show."""
        if trainer.is_global_zero:
            metrics = ", ".join(f"{tag} {value:.4g}" for tag, value in trainer.progress_bar_metrics.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {metrics}", flush=True)
