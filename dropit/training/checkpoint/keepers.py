"""Callbacks that put the config and random states into every checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor


class RandomKeeper(Callback):
    """Keeps the states of torch's generators, from which dropout and random strategies draw, in every checkpoint.

    Of each process: ``random`` in a checkpoint has a list of them for each.
    """

    def __init__(self) -> None:
        self._states: list[list[Any]] = []  # of a checkpoint
        self._noted: list[Tensor] = []
        self._is_rewound = False

    def note(self, pl_module: LightningModule) -> None:
        """Remember the states of now, between two steps."""
        self._noted = _states(pl_module)

    def rewind(self) -> None:
        """Have what is saved from now on keep the states that were noted last."""
        self._is_rewound = bool(self._noted)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes, which save together."""
        mine = self._noted if self._is_rewound else _states(pl_module)
        # On the processes' device, from which they can send each other what they have.
        parts = [trainer.strategy.all_gather(state.to(pl_module.device)).cpu() for state in mine]
        checkpoint["random"] = [
            [part.view(trainer.world_size, -1)[rank].clone() for part in parts] for rank in range(trainer.world_size)
        ]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the states: random numbers are still drawn before training starts."""
        self._states = checkpoint.get("random", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of this process; of another number of processes there are none that would do."""
        if not self._states:
            return
        if len(self._states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint is of {len(self._states)} processes, this run of {trainer.world_size}: dropout and "
                f"random strategies draw other numbers than if it had gone on as it was"
            )
            return
        state, *gpu = self._states[trainer.global_rank]
        torch.set_rng_state(state)
        if gpu and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(gpu[0], pl_module.device)


def _states(pl_module: LightningModule) -> list[Tensor]:
    """Of the generators that this process draws from: the CPU's, and its GPU's."""
    gpu = [torch.cuda.get_rng_state(pl_module.device)] if pl_module.device.type == "cuda" else []
    return [torch.get_rng_state(), *gpu]


class ConfigKeeper(Callback):
    """Keeps the config, as text, in every checkpoint."""

    def __init__(self, text: str) -> None:
        self._text = text

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the text."""
        checkpoint["config"] = self._text
