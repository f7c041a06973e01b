"""End a run whose loss or weights are no longer finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dropit.training.errors import UserError


class DivergedError(UserError):
    """The loss or a weight is not finite: further steps would train nothing."""


class FiniteLoss(Callback):
    """Ends a run whose loss is not finite, and writes no checkpoint whose weights are not finite.

    The loss is checked one step later, when it has been computed anyway, so that no GPU waits. ``last``: the callback
    that knows where the run's checkpoints are.
    """

    def __init__(self, last: ModelCheckpoint) -> None:
        self._last = last
        self._loss: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._step = ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss of the step before; remember this one's mean over all processes."""
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
        """Check the loss of the last step."""
        self._check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the loss before time is spent on an evaluation."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise instead of writing weights that training cannot continue from."""
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
        if not trainer.is_global_zero:  # one process reports for all
            raise SystemExit(0)
        directory = Path(self._last.dirpath or ".")
        kept = sorted(directory.glob("*.ckpt"))
        before = f"; {directory} holds the earlier {' and '.join(path.name for path in kept)}" if kept else ""
        raise DivergedError(f"{what}: a smaller SOLVER.LR, SOLVER.CLIP_NORM or SOLVER.WARMUP_EPOCHS may help{before}")


def _is_finite(module: nn.Module) -> bool:
    """Return whether all parameters are finite, as far as this process has them."""
    parts = (parameter.detach() for parameter in module.parameters())
    local = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    return all(bool(part.isfinite().all()) for part in local)
