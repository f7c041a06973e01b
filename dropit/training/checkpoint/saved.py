"""Find and read the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dropit.training.checkpoint.files import find_damage, read_file
from dropit.training.errors import SetupError

# What Lightning and ConfigKeeper put into each.
_PARTS = {"pytorch-lightning_version": str, "state_dict": dict, "epoch": int, "global_step": int, "config": str}


def newest(directory: Path, name: str) -> Path:
    """Return the checkpoint (best or last) of the newest run that has one."""
    found = sorted(directory.glob(f"version_*/checkpoints/{name}.ckpt"), key=_version)
    if not found:
        raise SetupError(f"no checkpoint {name}.ckpt below {directory}; train first, or give CKPT")
    return found[-1]


def _version(checkpoint: Path) -> int:
    number = version_dir(checkpoint).name.removeprefix("version_")
    return int(number) if number.isdigit() else -1


def version_dir(checkpoint: Path) -> Path:
    """Return the directory version_N of a run's checkpoint."""
    return checkpoint.parent.parent


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint that train.py wrote, with its config as text.

    Raises ConfigError if there is no such file, SetupError where it is damaged, something else, or has anything but
    tensors and plain values in it.
    """
    try:
        checkpoint = read_file(path, "CKPT")
    except SetupError as error:
        raise SetupError(f"{error}{_beside(path)}") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(name), kind) for name, kind in _PARTS.items()
    ):
        raise SetupError(f"CKPT {path}: not a checkpoint of train.py{_beside(path)}")
    return checkpoint


def _beside(path: Path) -> str:
    """Return what an error says of the other checkpoints beside it."""
    whole = [other.name for other in sorted(path.parent.glob("*.ckpt")) if other != path and not find_damage(other)]
    return f"; beside it {' and '.join(whole)} would do" if whole else ""
