"""Samples by their keys: key and seed determine everything random about a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dropit.training.data.batches import BatchMix, DeviceTransform, Place
from dropit.training.data.datasets import Cached, Folder, Source
from dropit.training.data.seeding import MIX, SAMPLE, derive_seed, preserved_generator
from dropit.training.data.transforms import ImageTransform
from dropit.training.errors import ConfigError, SetupError, UserError, describe


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
    seed: int  # for mixing the batch


class Samples(Dataset[Loaded | UserError]):
    """Batches of a data set by their keys; seed and key determine them bit for bit, whichever process loads them.

    ``cache`` keeps the decoded images in memory; ``on_device`` defers to ``finish`` what can be done for a batch.
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
        """Return the batch, or the error: raised in a worker, it would reach the user as a traceback."""
        try:
            return self.load(keys)
        except UserError as error:
            return error

    def load(self, keys: Sequence[Key]) -> Loaded:
        """Return the batch; torch's generator is restored afterwards."""
        images, labels, places = [], [], []
        with preserved_generator() as generator:
            for key in keys:
                generator.manual_seed(derive_seed(self.seed, SAMPLE, *key))
                image, label, place = self._named_sample(key.sample)
                images.append(image)
                labels.append(label)
                places.append(place)
        _check_sizes(images)
        mix_seed = derive_seed(self.seed, MIX, *keys[0])  # its first key tells it from other processes' batches too
        return Loaded(torch.stack(images), torch.tensor(labels), torch.tensor(places), mix_seed)

    def _named_sample(self, index: int) -> tuple[Tensor, int, Place]:
        """Return the sample; any error names it, and the process that loads it if that is another."""
        try:
            return self._sample(index)
        except ConfigError:
            raise
        except Exception as error:
            worker = get_worker_info()
            where = f" in loader process {worker.id}" if worker else ""
            what = str(error) if isinstance(error, UserError) else describe(error)
            name = self._folder.samples[index][0] if self._folder else f"image {index}"
            raise SetupError(what if name in what else f"{name}{where}: {what}") from error

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
        """Return images, (N, 3, H, W) floats, and labels: class numbers (N,), or soft (N, classes) after mixing."""
        images, labels = batch.images, batch.labels
        if self.device_transform:
            images = self.device_transform(images, batch.places)
        return self.mix(images, labels, batch.seed) if self.mix else (images, labels)

    @property
    def skipped(self) -> list[str]:
        """Return the paths of the unreadable images that were left out so far."""
        return self._folder.skipped if self._folder else []


def _check_sizes(images: Sequence[Tensor]) -> None:
    sizes = sorted({(image.shape[2], image.shape[1]) for image in images})
    if len(sizes) > 1:
        (width, height), (other_width, other_height) = sizes[:2]
        raise ConfigError(
            f"DATALOADER.ON_DEVICE crops whole batches, but one has images of {width} x {height} and of "
            f"{other_width} x {other_height}: set it to false"
        )
