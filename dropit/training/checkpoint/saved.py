"""The checkpoints of a run: finding them, reading them without running code, and refusing those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from yacs.config import CfgNode

from dropit.training.checkpoint.writer import is_whole
from dropit.training.config.keys import flatten
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.pretrained import read_file


def newest(directory: Path, name: str) -> Path:
    """The checkpoint (best or last) of the newest run that has one."""
    found = sorted(directory.glob(f"version_*/checkpoints/{name}.ckpt"), key=_version)
    if not found:
        raise SetupError(f"no checkpoint {name}.ckpt below {directory}; train first, or give CKPT")
    return found[-1]


def _version(checkpoint: Path) -> int:
    number = version_dir(checkpoint).name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def version_dir(checkpoint: Path) -> Path:
    """The version_N that a checkpoint of a run lies in."""
    return checkpoint.parent.parent


def read(path: Path, *, like: CfgNode, sections: tuple[str, ...]) -> dict[str, Any]:
    """A checkpoint that train.py wrote with a config that is ``like`` this one in the ``sections`` that matter.

    Raises SetupError where it is damaged, something else, or holds anything but tensors and plain values, and
    ConfigError where it does not fit.
    """
    whole = is_whole(path) if path.is_file() else None
    if whole is False:
        raise SetupError(f"CKPT {path}: damaged, its checksum does not match{_beside(path)}")
    checkpoint = read_file(path, "CKPT")
    if whole is None or not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise SetupError(f"CKPT {path}: not a checkpoint of train.py{_beside(path)}")
    _check_same(flatten(CfgNode.load_cfg(checkpoint["config"])), flatten(like), path, sections)
    return checkpoint


def _beside(path: Path) -> str:
    """What could be taken instead."""
    whole = [other.name for other in sorted(path.parent.glob("*.ckpt")) if other != path and is_whole(other)]
    return f"; beside it {' and '.join(whole)} would do" if whole else ""


def _check_same(kept: dict[str, Any], wanted: dict[str, Any], path: Path, sections: tuple[str, ...]) -> None:
    for key, value in wanted.items():
        if key.startswith(sections) and key != "MODEL.PRETRAINED" and kept.get(key, value) != value:
            raise ConfigError(f"{path} does not fit: checkpoint {key} {kept[key]}, config {value}")


class RandomKeeper(Callback):
    """Keeps the state of torch's generators, which dropout and random strategies draw from, in every checkpoint."""

    def __init__(self) -> None:
        self._state: list[Any] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it; of the process that saves."""
        gpus = torch.cuda.get_rng_state_all() if pl_module.device.type == "cuda" else []
        checkpoint["random"] = [torch.get_rng_state(), *gpus]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it for later: more is drawn before training goes on."""
        self._state = checkpoint.get("random", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from there."""
        if self._state and trainer.world_size == 1:  # the others' states are not known
            torch.set_rng_state(self._state[0].cpu())
            for device, state in enumerate(self._state[1 : torch.cuda.device_count() + 1]):
                torch.cuda.set_rng_state(state.cpu(), device)


class ConfigKeeper(Callback):
    """Keeps the config, as text, in every checkpoint."""

    def __init__(self, cfg: CfgNode) -> None:
        self._text = cfg.dump()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the text."""
        checkpoint["config"] = self._text
