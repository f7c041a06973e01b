"""Write checkpoints, each whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from dropit.training.errors import SetupError


class CheckpointWriter(TorchCheckpointIO):
    """Writes beside the target, syncs to the disk and renames, so that there is always a whole checkpoint."""

    is_writing = False  # now

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it. Raises SetupError where that fails; the checkpoint before is then unchanged."""
        path = Path(path)
        part = path.with_suffix(".part")
        self.is_writing = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync(path.parent)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink()
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise  # as of a GPU, whose errors often come up where something is copied from it
            raise SetupError(
                f"{path}: cannot be written ({cause.strerror}); what was saved before is as it was"
            ) from error
        finally:
            self.is_writing = False


def _sync(directory: Path) -> None:
    """Write the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def check_space(directory: Path, nbytes: int) -> None:
    """Raise SetupError where the directory's disk has less than ``nbytes`` left."""
    needed, free = nbytes / 1e6, _free(directory) / 1e6
    if free < needed:
        raise SetupError(f"OUTPUT_DIR needs {needed:.0f} MB for checkpoints, {free:.0f} MB free at {directory}")
