"""How the samples get to the model: in which order, in which process, and with which random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dropit.training.data.datasets import Cached, Folder, Source
from dropit.training.data.transforms import BatchMix, DeviceTransform, ImageTransform, Place, derive_seed, own_generator
from dropit.training.errors import ConfigError, SetupError, UserError

# What a seed is for: none is used twice.
_ORDER, _SAMPLE, _MIX = range(3)


class Key(NamedTuple):
    """A sample to be drawn: everything random about it is a function of this and the seed."""

    epoch: int
    sample: int
    repeat: int


class Loaded(NamedTuple):
    """A batch as it leaves the loader; ``Samples.finish`` makes images and labels of it, on its device."""

    images: Tensor  # (N, 3, H, W): uint8 if the rest is done on the device
    labels: Tensor  # (N,) int64
    places: Tensor  # (N, 3) int64, each a Place
    seed: int  # of what is done to the batch as a whole


class Samples(Dataset[Loaded | UserError]):
    """Batches of a data set, by their keys. ``seed``, key and image decide, bit for bit, whichever process loads it.

    ``cache`` keeps the decoded images in memory; ``on_device`` leaves to the device what can be done for a batch.
    """

    def __init__(
        self,
        source: Source,
        transform: ImageTransform,
        *,
        seed: int = 0,
        cache: bool = False,
        on_device: bool = False,
        mix: BatchMix | None = None,
    ) -> None:
        self.classes, self.seed, self.mix = source.classes, seed, mix
        self._folder = source if isinstance(source, Folder) else None
        if cache:
            source, transform = Cached(source, transform.fixed), replace(transform, fixed=())
        self.source, self.transform = source, transform
        self.device_transform = DeviceTransform(transform) if on_device else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, keys: Sequence[Key]) -> Loaded | UserError:
        """The batch, or what is wrong with it: raised in a worker, an error would reach the user as a traceback."""
        try:
            return self.load(keys)
        except UserError as error:
            return error

    def load(self, keys: Sequence[Key]) -> Loaded:
        """The batch; draws nothing from torch's generator, as seen from outside."""
        images, labels, places = [], [], []
        with own_generator() as generator:
            for key in keys:
                generator.manual_seed(derive_seed(self.seed, _SAMPLE, *key))
                image, label, place = self._sample(key.sample)
                images.append(image)
                labels.append(label)
                places.append(place)
        _check_sizes(images)
        mix_seed = derive_seed(self.seed, _MIX, *keys[0])  # its first key tells a batch from other processes' too
        return Loaded(torch.stack(images), torch.tensor(labels), torch.tensor(places), mix_seed)

    def _sample(self, index: int) -> tuple[Tensor, int, Place]:
        if self.device_transform:
            pixels, label = self._pixels(self.device_transform, index)
            return pixels, label, self.device_transform.place(pixels)
        image, label = self.source[index]
        return self.transform(image), label, (0, 0, 0)

    def _pixels(self, transform: DeviceTransform, index: int) -> tuple[Tensor, int]:
        if isinstance(self.source, Cached) and not transform.early:
            return self.source.tensor(index)
        image, label = self.source[index]
        return transform.pixels(image), label

    def finish(self, batch: Loaded) -> tuple[Tensor, Tensor]:
        """Images, (N, 3, H, W) floats, and labels: class numbers (N,), or soft ones (N, classes) after mixing."""
        images, labels = batch.images, batch.labels
        if self.device_transform:
            images = self.device_transform(images, batch.places)
        return self.mix(images, labels, batch.seed) if self.mix else (images, labels)

    @property
    def skipped(self) -> list[str]:
        """The images that could not be read and were left out so far."""
        return self._folder.skipped if self._folder else []


def _check_sizes(images: Sequence[Tensor]) -> None:
    sizes = sorted({(image.shape[2], image.shape[1]) for image in images})
    if len(sizes) > 1:
        (width, height), (other_width, other_height) = sizes[:2]
        raise ConfigError(
            f"DATALOADER.ON_DEVICE crops whole batches, but one has images of {width} x {height} and of "
            f"{other_width} x {other_height}: set it to false"
        )


class SharedBatches(DistributedSampler[list[Key]]):
    """The keys of each of one process's batches in an epoch, ``batch_size`` a process.

    Process ``rank`` of ``world`` takes every world-th sample of each batch of all together, so that the processes see
    what one alone would see in batches ``world`` times as large. As DDP wants as many batches of each process, with a
    sample in each, in training the last batch is filled up from the epoch's beginning; otherwise, where nothing may be
    seen twice, a rest too small to go round joins the batch before. ``repeats``: each image is drawn so many times in
    a row, and an epoch has as many samples as ever. ``start``: batches of its epoch that the next iteration leaves out;
    ``taken``: those that are behind us, as the loader counts them.

    A DistributedSampler, so that Lightning neither replaces nor wraps it.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        train: bool,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        super().__init__(samples, num_replicas=world, rank=rank, shuffle=train, seed=samples.seed)
        self.count, self.repeats = len(samples), repeats
        self.start = self.taken = 0
        self.global_batch = batch_size * world
        if self.count < world:
            kind = "training" if train else "validation"
            raise SetupError(
                f"NUM_GPUS {world}: the {self.count} {kind} image{'s' * (self.count > 1)} cannot be shared between "
                f"so many processes"
            )

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.global_batch)
        if not self.shuffle and whole and rest < self.num_replicas:
            return whole
        return whole + (rest > 0)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch starts at its beginning."""
        if epoch != self.epoch:
            self.start = self.taken = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        self.taken = self.start
        end = self.count + (-self.count % self.num_replicas if self.shuffle else 0)
        for number in range(self.start, len(self)):
            first = number * self.global_batch
            last = end if number == len(self) - 1 else first + self.global_batch
            places = torch.arange(first + self.rank, last, self.num_replicas) % self.count
            repeat = places % self.repeats
            yield [Key(epoch, *pair) for pair in zip(order[places].tolist(), repeat.tolist(), strict=True)]

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.count)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, _ORDER, self.epoch))
        return torch.randperm(self.count, generator=generator).repeat_interleave(self.repeats)[: self.count]


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
        prefetch: int = 2,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.repeats = batch_size, repeats
        self.num_workers, self.prefetch = num_workers, prefetch

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
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": self.prefetch}
        repeats = self.repeats if train else 1
        return Loader(
            samples,
            batch_size=None,  # the keys are those of a batch
            sampler=SharedBatches(samples, self.batch_size, train=train, rank=rank, world=world, repeats=repeats),
            num_workers=self.num_workers,
            pin_memory=device == "cuda",
            generator=torch.Generator(),  # or it would draw from torch's own, for seeds that nobody uses
            **(options if self.num_workers else {}),
        )
