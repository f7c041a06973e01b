"""The data sets and what is done to their images: digits, CIFAR-100 and image folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms import v2

from dropit.training.errors import ConfigError, SetupError

Transform = Callable[[Image.Image], Tensor]
Sample = tuple[Tensor, int]
DOWNLOADS = Path("data")


def train_transform(
    size: int, mean: Sequence[float], std: Sequence[float], *, crop: str, crop_scale: Sequence[float], flip: bool
) -> Transform:
    """What a training image goes through; ``crop`` is pad, random_resized or none."""
    crops: dict[str, list[v2.Transform]] = {
        "pad": [v2.RandomCrop(size, padding=4, padding_mode="reflect")],
        "random_resized": [v2.RandomResizedCrop(size, scale=tuple(crop_scale), antialias=True)],
        "none": [v2.Resize((size, size), antialias=True)],
    }
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([*crops[crop], *flips, *_to_tensor(mean, std)])  # type: ignore[no-any-return]


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float], *, resize: int) -> Transform:
    """What a validation image goes through: its centre if ``resize`` is given, or the whole image resized."""
    if resize:
        steps = [v2.Resize(resize, antialias=True), v2.CenterCrop(size)]
    else:
        steps = [v2.Resize((size, size), antialias=True)]
    return v2.Compose([*steps, *_to_tensor(mean, std)])  # type: ignore[no-any-return]


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


class Digits(Dataset[Sample]):
    """The 1,797 handwritten digits that scikit-learn ships, 8 x 8; every fifth is for validation."""

    classes = tuple("0123456789")

    def __init__(self, train: bool, transform: Transform) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SetupError('DATASET digits needs scikit-learn: pip install "dropit[digits]"') from error
        digits = load_digits()
        chosen = (np.arange(len(digits.target)) % 5 != 0) == train
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8), of 0 to 16
        self.labels = digits.target[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), self.labels[index]


def open_dataset(name: str, path: str, *, train: bool, transform: Transform) -> Any:
    """The training or validation half of a data set; where ``path`` is given, that image folder."""
    if path:
        return _open_folder(path, transform, _path_key(train))
    if name == "digits":
        return Digits(train, transform)
    if name == "cifar100":
        return _open_cifar100(train, transform)
    raise ConfigError(f"{_path_key(train)} is not set: DATASET {name} is read from {_tree('DIR')}")


def _open_folder(path: str, transform: Transform, key: str) -> ImageFolder:
    if not Path(path).is_dir():
        raise SetupError(f"{key} {path} is not a directory: expected {_tree(path)}")
    try:
        return ImageFolder(path, transform)
    except FileNotFoundError as error:  # no class, or a class without an image
        raise SetupError(f"{key} {path}: {' '.join(str(error).split())}; expected {_tree(path)}") from error


def _open_cifar100(train: bool, transform: Transform) -> CIFAR100:
    try:
        return CIFAR100(DOWNLOADS, train=train, transform=transform, download=True)
    except (OSError, RuntimeError) as error:
        raise SetupError(
            f"CIFAR-100 is not in {DOWNLOADS} and could not be downloaded ({error}); "
            f"give TRAIN.PATH and VAL.PATH to read it from {_tree('DIR')}"
        ) from error


def _path_key(train: bool) -> str:
    return "TRAIN.PATH" if train else "VAL.PATH"


def _tree(path: str) -> str:
    return f"{path}/<class>/<image>.jpg"


class ImageData(LightningDataModule):
    """The two loaders. ``batch_size`` is that of one process."""

    def __init__(self, train: Any, val: Any, *, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.num_workers = batch_size, num_workers

    def steps_per_epoch(self, processes: int) -> int:
        """Training steps in an epoch, when the samples are shared between so many processes."""
        return math.ceil(math.ceil(len(self.train) / processes) / self.batch_size)

    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch of training images from all over the data set, which may be in the order of its classes."""
        places = torch.linspace(0, len(self.train) - 1, min(self.batch_size, len(self.train))).long().tolist()
        with torch.random.fork_rng(devices=[]):
            images, labels = zip(*(self.train[place] for place in places), strict=True)
        return torch.stack(images), torch.tensor(labels)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of the training images."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Batches of the validation images, in order."""
        return self._loader(self.val, shuffle=False)

    def _loader(self, dataset: Any, shuffle: bool) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def check_classes(train: Any, val: Any, num_classes: int) -> None:
    """Refuse folders whose classes differ, which would be numbered differently, or outnumber the model's."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        raise ConfigError(f"TRAIN.PATH and VAL.PATH differ in their classes: only one of them has {differing[0]!r}")
    if len(train.classes) > num_classes:
        raise ConfigError(f"MODEL.NUM_CLASSES is {num_classes}, but the data has {len(train.classes)} classes")
