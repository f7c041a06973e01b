"""The loaders of both data sets, resumed in mid-epoch, and Lightning's data module around them."""

from __future__ import annotations

import math
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Key, Loaded, Samples
from dropit.training.errors import ConfigError, SetupError, UserError


class Loader(DataLoader[Loaded | UserError]):
    """A DataLoader that can resume in mid-epoch, and raises a worker's error as it is, without the worker's traceback.

    Workers start with the first batch, as Lightning asks for an iterator before it tells the epoch. Those that send
    none for ``patience`` seconds are killed: PyTorch's own timeout does not see one that stops while it sends a batch.
    """

    sampler: SharedBatches
    patience: float = 0  # seconds that a batch of the workers is waited for; 0 for ever

    def __iter__(self) -> Iterator[Loaded]:  # type: ignore[override]
        batches = super().__iter__()
        with _Watch(getattr(batches, "_workers", ()), self.patience) as watch:
            while True:
                try:
                    with watch.waiting():
                        batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if watch.has_killed:
                        raise _not_answering() from error
                    # Of one that ended while it handed a batch over PyTorch says no more than that.
                    is_of_connection = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
                    raise (_ended("") if is_of_connection else lost_worker(error)) or error from error
                if isinstance(batch, UserError):
                    raise batch
                self.sampler.taken += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch, which Lightning keeps in checkpoints."""
        return {"epoch": self.sampler.epoch, "taken": self.sampler.taken, "batch": self.sampler.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there in the next iteration; raises ConfigError in mid-epoch if the batch size differs."""
        taken, size, now = state["taken"], state["batch"], self.sampler.global_batch
        if now != size and 0 < taken * size < self.sampler.count:
            raise ConfigError(
                f"the checkpoint is of the middle of an epoch, after {taken} batches of {size} images: "
                f"SOLVER.BATCH_SIZE divided by SOLVER.ACCUMULATE must be {size} again, not {now}"
            )
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = self.sampler.taken = state["taken"]


class _Watch:
    """Kills the workers where ``waiting`` takes longer than ``patience`` seconds, if that is not 0."""

    def __init__(self, workers: Sequence[Any], patience: float) -> None:
        self._workers, self._patience = workers, patience
        self._deadline = math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loader watch", daemon=True)
        self.has_killed = False

    def __enter__(self) -> _Watch:
        if self._workers and self._patience:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for a batch inside."""
        self._deadline = monotonic() + self._patience
        try:
            yield
        finally:
            self._deadline = math.inf

    def _look(self) -> None:
        while not self._ended.wait(self._patience / 4):
            if monotonic() > self._deadline:
                self.has_killed = True
                for worker in self._workers:
                    worker.kill()
                return


def _not_answering() -> SetupError:
    return SetupError(
        f"no loader process has sent a batch within DATALOADER.TIMEOUT: they wait for a file, or for shared memory, of "
        f"which {_free_shared_memory()} are free; fewer DATALOADER.NUM_WORKERS (0 for none) need less of it"
    )


def lost_worker(error: BaseException) -> SetupError | None:
    """Return what to say where an error of PyTorch's is of a loader process that has ended."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader "):
        return None
    killed = re.search(r"killed by signal: ([\w ]+)", text)
    return _ended(f" ({killed[1].strip()})" if killed else "")


def _ended(how: str) -> SetupError:
    return SetupError(
        f"a loader process was ended{how}: for want of memory, most likely; shared memory has {_free_shared_memory()} "
        f"free; fewer DATALOADER.NUM_WORKERS (0 for none) need less"
    )


def _free_shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "an unknown part"
    return f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB"


def _leave_interrupts_to_parent(_: int) -> None:
    """A terminal's Ctrl-C reaches loader processes as well, which would print a traceback each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ImageData(LightningDataModule):
    """Both loaders, and what is done to a batch on its device.

    ``batch_size`` is that of one process; ``timeout``: seconds after which a loader process is given up, 0 for never.
    """

    def __init__(
        self,
        train: Samples,
        val: Samples,
        *,
        batch_size: int,
        num_workers: int = 0,
        timeout: float = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.repeats = batch_size, repeats
        self.num_workers, self.timeout = num_workers, timeout

    def steps_per_epoch(self, processes: int) -> int:
        """Return the training batches of each process in an epoch."""
        return len(SharedBatches(self.train, self.batch_size, train=True, world=processes))

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return a batch of training images spread over the data set, which may be sorted by class."""
        places = torch.linspace(0, len(self.train) - 1, min(self.batch_size, len(self.train))).long().tolist()
        return self.train.finish(self.train.load([Key(0, place, 0) for place in places]))

    def train_dataloader(self) -> Loader:
        """Return the loader of this process's shuffled batches of the training images."""
        return self._loader(self.train, train=True)

    def val_dataloader(self) -> Loader:
        """Return the loader of this process's batches of the validation images, in order, each image once."""
        return self._loader(self.val, train=False)

    def on_after_batch_transfer(self, batch: Loaded, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Return images and labels in the trainer's precision."""
        trainer = self.trainer
        assert trainer is not None
        samples = self.train if trainer.training else self.val
        return cast("tuple[Tensor, Tensor]", trainer.precision_plugin.convert_input(samples.finish(batch)))

    @property
    def skipped(self) -> list[str]:
        """Return the paths of the unreadable images that this process has left out so far."""
        return [*self.train.skipped, *self.val.skipped]

    def _loader(self, samples: Samples, *, train: bool) -> Loader:
        rank, world, device = 0, 1, "cpu"
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device.type
        repeats = self.repeats if train else 1
        loader = Loader(
            samples,
            batch_size=None,  # the keys are those of a batch
            sampler=SharedBatches(samples, self.batch_size, train=train, rank=rank, world=world, repeats=repeats),
            num_workers=self.num_workers,
            worker_init_fn=_leave_interrupts_to_parent,
            pin_memory=device == "cuda",
            generator=torch.Generator(),  # else it draws seeds that nothing uses from torch's
            persistent_workers=self.num_workers > 0,
        )
        loader.patience = self.timeout
        return loader
