"""The checkpoints of a run: finding them, reading them without running code, and refusing those that do not fit."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from yacs.config import CfgNode

from dropit.training.config import flatten
from dropit.training.errors import ConfigError, SetupError
from dropit.training.pretrained import read_file


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

    Refused if it holds anything but tensors and plain values.
    """
    checkpoint = read_file(path, "CKPT")
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise SetupError(f"{path}: not a checkpoint of train.py")
    _check_same(flatten(CfgNode.load_cfg(checkpoint["config"])), flatten(like), path, sections)
    return checkpoint


def _check_same(kept: dict[str, Any], wanted: dict[str, Any], path: Path, sections: tuple[str, ...]) -> None:
    for key, value in wanted.items():
        if key.startswith(sections) and key != "MODEL.PRETRAINED" and kept.get(key, value) != value:
            raise ConfigError(f"{path} does not fit: checkpoint {key} {kept[key]}, config {value}")


class Interruption(SystemExit):
    """A run that was asked to stop, and did; the exit code is the shell's for the signal."""

    def __init__(self, signum: int, saved: Path) -> None:
        super().__init__(128 + signum)
        self.name, self.saved = signal.Signals(signum).name, saved


class Interruptions(Callback):
    """Ends a run that SIGTERM or SIGINT asks to stop: after the batch at hand, with a checkpoint of that moment.

    A second signal ends it at once. ``last``: where the run's last.ckpt goes.
    """

    EVERY = 10  # batches, after which several processes ask each other

    def __init__(self, last: ModelCheckpoint) -> None:
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
        """Stop here, if asked to."""
        self._stop_if_asked(trainer, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Or in an evaluation."""
        self._stop_if_asked(trainer, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end, which Lightning does not come to."""
        self._restore()

    def _note(self, signum: int, frame: Any) -> None:
        self._signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop_if_asked(self, trainer: Trainer, batch_idx: int) -> None:
        signum = self._signum
        if trainer.world_size > 1:
            if batch_idx % self.EVERY:
                return
            asked = torch.tensor(signum, device=trainer.strategy.root_device)
            signum = int(trainer.strategy.all_gather(asked).max())
        if signum:
            path = Path(self._last.dirpath or ".", f"{self._last.filename}.ckpt")
            trainer.save_checkpoint(path)
            raise Interruption(signum, path)


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
