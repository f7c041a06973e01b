"""Checkpoints on the disk: written whole or not at all, with a checksum that tells a damaged one."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from dropit.training.errors import SetupError

_MARK = b"sha256:"
_SEAL = len(_MARK) + 64  # bytes of a checksum in hexadecimal digits, and what is before it
_LENGTH = struct.Struct("<H")
_BLOCK = 2**20


class CheckpointWriter(TorchCheckpointIO):
    """Writes beside the target, to the disk, and then in its place, so that there is always a whole checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it, with a checksum. Raises SetupError where it cannot; what was there before is then still there."""
        path = Path(path)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w+b") as file:
                torch.save(checkpoint, file)
                _seal(file)
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


def _seal(file: BinaryIO) -> None:
    """Put the checksum of a zip file, which torch.save writes, into its comment: its last bytes, which readers skip."""
    file.flush()
    size = file.seek(-_LENGTH.size, os.SEEK_END)  # up to the comment's length, until now 0
    file.seek(0)
    digest = _digest(file, size)
    file.seek(size)
    file.write(_LENGTH.pack(_SEAL) + _MARK + digest)
    file.flush()
    os.fsync(file.fileno())


def is_whole(path: Path) -> bool | None:
    """Whether a file is what CheckpointWriter wrote, to the last bit; None where it never was, or cannot be read."""
    try:
        size = path.stat().st_size - _LENGTH.size - _SEAL
        with path.open("rb") as file:
            file.seek(max(size, 0))
            end = file.read()
            if not end.startswith(_LENGTH.pack(_SEAL) + _MARK):
                return None
            file.seek(0)
            return end.endswith(_MARK + _digest(file, size))
    except OSError:
        return None


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the next ``size`` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        digest.update(file.read(min(_BLOCK, size - start)))
    return digest.hexdigest().encode()


def _sync(directory: Path) -> None:
    """Let the names in it reach the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def check_space(directory: Path, nbytes: int) -> None:
    """Raises SetupError where there are not so many left."""
    needed, free = nbytes / 1e6, _free(directory) / 1e6
    if free < needed:
        raise SetupError(f"OUTPUT_DIR needs {needed:.0f} MB for checkpoints, {free:.0f} MB free at {directory}")
