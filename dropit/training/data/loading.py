"""The loaders of both data sets, resumed in mid-epoch, and Lightning's data module around them."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import signal
from collections.abc import Iterator
from typing import cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Key, Loaded, Samples
from dropit.training.errors import ConfigError, SetupError, UserError


class Loader(DataLoader[Loaded | UserError]):
    """A DataLoader that can resume in mid-epoch, and raises a worker's error as it is, without the worker's traceback.

    Workers start with the first batch, as Lightning asks for an iterator before it tells the epoch.
    """

    sampler: SharedBatches

    def __iter__(self) -> Iterator[Loaded]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                self.sampler.taken += 1
                yield batch
        except RuntimeError as error:
            raise lost_worker(error) or error from error

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


def lost_worker(error: BaseException) -> SetupError | None:
    """Return what to say where a RuntimeError of PyTorch's is of a loader process that ended or does not answer."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader "):
        return None
    if "timed out" in text:
        for process in multiprocessing.active_children():  # which this one would wait for at its end
            process.kill()
        return SetupError(
            f"a loader process has not sent a batch within DATALOADER.TIMEOUT: it waits for a file, or for shared "
            f"memory, of which {_free_shared_memory()} free; fewer DATALOADER.NUM_WORKERS (0 for none) need less of it"
        )
    killed = re.search(r"killed by signal: ([\w ]+)", text)
    return SetupError(
        f"a loader process was ended{f' ({killed[1].strip()})' if killed else ''}: for want of memory, most likely; "
        f"shared memory has {_free_shared_memory()} free; fewer DATALOADER.NUM_WORKERS (0 for none) need less"
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
        return Loader(
            samples,
            batch_size=None,  # the keys are those of a batch
            sampler=SharedBatches(samples, self.batch_size, train=train, rank=rank, world=world, repeats=repeats),
            num_workers=self.num_workers,
            timeout=self.timeout if self.num_workers else 0,
            worker_init_fn=_leave_interrupts_to_parent,
            pin_memory=device == "cuda",
            generator=torch.Generator(),  # else it draws seeds that nothing uses from torch's
            persistent_workers=self.num_workers > 0,
        )
