"""Callbacks that put the config and random states into every checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class RandomKeeper(Callback):
    """Keeps the states of torch's generators, from which dropout and random strategies draw, in every checkpoint."""

    def __init__(self) -> None:
        self._state: list[Any] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of the process that saves."""
        gpus = torch.cuda.get_rng_state_all() if pl_module.device.type == "cuda" else []
        checkpoint["random"] = [torch.get_rng_state(), *gpus]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the states: random numbers are still drawn before training starts."""
        self._state = checkpoint.get("random", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states, in a run of one process: those of the others were not saved."""
        if self._state and trainer.world_size == 1:
            torch.set_rng_state(self._state[0].cpu())
            for device, state in enumerate(self._state[1 : torch.cuda.device_count() + 1]):
                torch.cuda.set_rng_state(state.cpu(), device)


class ConfigKeeper(Callback):
    """Keeps the config, as text, in every checkpoint."""

    def __init__(self, text: str) -> None:
        self._text = text

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the text."""
        checkpoint["config"] = self._text
