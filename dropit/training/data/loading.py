"""The loaders of both data sets, resumed in mid-epoch, and Lightning's data module around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Key, Loaded, Samples
from dropit.training.errors import ConfigError, UserError


class Loader(DataLoader[Loaded | UserError]):
    """A DataLoader that is resumed in mid-epoch, and raises a worker's error in its own one line.

    Workers start with the first batch, as Lightning asks for an iterator before it tells the epoch.
    """

    sampler: SharedBatches

    def __iter__(self) -> Iterator[Loaded]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            self.sampler.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where it is; Lightning keeps it in checkpoints."""
        return {"epoch": self.sampler.epoch, "taken": self.sampler.taken, "batch": self.sampler.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, with the next iteration. Raises ConfigError within an epoch of batches of another size."""
        taken, size, now = state["taken"], state["batch"], self.sampler.global_batch
        if now != size and 0 < taken * size < self.sampler.count:
            raise ConfigError(
                f"the checkpoint is of the middle of an epoch, after {taken} batches of {size} images: "
                f"SOLVER.BATCH_SIZE divided by SOLVER.ACCUMULATE must be {size} again, not {now}"
            )
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = self.sampler.taken = state["taken"]


class ImageData(LightningDataModule):
    """The two loaders, and what is done to a batch on its device. ``batch_size`` is that of one process."""

    def __init__(
        self,
        train: Samples,
        val: Samples,
        *,
        batch_size: int,
        num_workers: int = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.repeats = batch_size, repeats
        self.num_workers = num_workers

    def steps_per_epoch(self, processes: int) -> int:
        """Training steps in an epoch, when the samples are shared between so many processes."""
        return len(SharedBatches(self.train, self.batch_size, train=True, world=processes))

    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch of training images from all over the data set, which may be in the order of its classes."""
        places = torch.linspace(0, len(self.train) - 1, min(self.batch_size, len(self.train))).long().tolist()
        return self.train.finish(self.train.load([Key(0, place, 0) for place in places]))

    def train_dataloader(self) -> Loader:
        """This process's shuffled batches of the training images."""
        return self._loader(self.train, train=True)

    def val_dataloader(self) -> Loader:
        """This process's batches of the validation images, in order, each image once."""
        return self._loader(self.val, train=False)

    def on_after_batch_transfer(self, batch: Loaded, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Images and labels, in the trainer's precision."""
        trainer = self.trainer
        assert trainer is not None
        samples = self.train if trainer.training else self.val
        return cast("tuple[Tensor, Tensor]", trainer.precision_plugin.convert_input(samples.finish(batch)))

    @property
    def skipped(self) -> list[str]:
        """The images that could not be read and were left out so far, by this process."""
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
            pin_memory=device == "cuda",
            generator=torch.Generator(),  # or it would draw from torch's own, for seeds that nobody uses
            persistent_workers=self.num_workers > 0,
        )
