"""A resumed run's settings of the optimizer: those of the config, where it has changed."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class SolverSettings(Callback):
    """Gives a restored optimizer and its schedule the settings of the config, which a checkpoint's replace otherwise.

    Learning rate, momentum, betas and weight decay. ``changed``: whether the config differs from the checkpoint's in
    them; else nothing is touched.
    """

    def __init__(self, *, changed: bool) -> None:
        self._changed = changed
        self._own: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember what the config says, before the checkpoint is loaded."""
        if self._changed:
            optimizer: Any = pl_module.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
            self._own = [_settings(group) for group in optimizer.param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply it."""
        if not self._own:
            return
        (optimizer,) = trainer.optimizers
        (config,) = trainer.lr_scheduler_configs
        apply_settings(optimizer, config.scheduler, self._own)


def apply_settings(optimizer: Optimizer, schedule: Any, settings: list[dict[str, Any]]) -> None:
    """Set the settings of each group; the rate to what the schedule makes of it at the epoch where it is."""
    schedule.base_lrs = [each["lr"] for each in settings]
    for group, own, factor in zip(optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):
        group.update(own, initial_lr=own["lr"], lr=own["lr"] * factor(schedule.last_epoch))
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a config decides of a group of parameters."""
    return {name: value for name, value in group.items() if name in ("lr", "momentum", "betas", "weight_decay")} | {
        "lr": group.get("initial_lr", group["lr"])
    }
