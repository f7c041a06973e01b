"""The directory of a run, version_N: each has one, and one process that writes to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from dropit.training.errors import SetupError

try:
    import fcntl
except ImportError:  # Windows has no such locks, and two runs of one directory are not told from each other there
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


class RunDirectory:
    """A version_N that this process holds, until it ends in whichever way: the system then releases the lock."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        self.path, self.is_new = path, is_new
        self._lock: IO[str] | None = None

    @classmethod
    def claim(cls, directory: Path) -> RunDirectory:
        """Make the next version_N below ``directory``, which no other run gets."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            numbers = (path.name.removeprefix("version_") for path in directory.glob("version_*"))
            number = max((int(number) for number in numbers if number.isdecimal()), default=-1)
            while True:
                number += 1
                try:
                    (directory / f"version_{number}").mkdir()
                    break
                except FileExistsError:  # by another run, in this moment
                    continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SetupError(f"OUTPUT_DIR: cannot write to {directory}: {reason}") from error
        return cls(directory / f"version_{number}", is_new=True)._locked()

    @classmethod
    def take_up(cls, path: Path) -> RunDirectory:
        """Hold the directory of a run that is resumed. Raises SetupError where another process does."""
        return cls(path, is_new=False)._locked()

    def discard(self) -> None:
        """Remove it, if it is new and holds no checkpoint."""
        if self.is_new and not any(self.path.rglob("*.ckpt")):
            shutil.rmtree(self.path, ignore_errors=True)

    def _locked(self) -> RunDirectory:
        try:
            self._lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise SetupError(f"OUTPUT_DIR: cannot write to {self.path}: {error.strerror}") from error
        if fcntl is not None:
            try:
                # Of this process alone: loader processes, which outlive a killed one for seconds, do not inherit it.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SetupError(f"{self.path} is written to by another train.py, which still runs") from error
            except OSError:  # a file system without locks
                pass
        return self
