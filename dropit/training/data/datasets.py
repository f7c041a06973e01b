"""The data sets: each returns RGB images and the numbers of their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dropit.training.data.transforms import Steps, apply
from dropit.training.errors import ConfigError, SetupError

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "folder", "fake")
UNREADABLE = ("fail", "skip")
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # of these; some of Pillow's others start programs
DOWNLOADS = Path("data")
_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class Source(Protocol):
    """A data set with torchvision's interface."""

    @property
    def classes(self) -> Sequence[str]:
        """Return their names, in the order of their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


def open_dataset(
    name: str, path: str, *, train: bool, size: int = 224, num_classes: int = 1000, unreadable: str = "fail"
) -> Source:
    """Return the training or validation half of a data set, or the image folder ``path`` if it is given.

    ``size`` and ``num_classes`` are those of fake; ``unreadable`` (of UNREADABLE) is for image folders.
    """
    if name == "fake":
        return Fake(train, size, num_classes)
    if path:
        return _open_folder(path, _path_key(train), unreadable)
    if name == "digits":
        return Digits(train)
    if name in _CIFAR:
        return _open_cifar(name, train)
    raise ConfigError(f"{_path_key(train)} is not set: DATASET {name} is read from {_tree('DIR')}")


def check_classes(train: Source, val: Source, num_classes: int) -> None:
    """Raise ConfigError for folders whose classes differ, or that have more classes than the model."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        raise ConfigError(f"TRAIN.PATH and VAL.PATH differ in their classes: only one of them has {differing[0]!r}")
    if len(train.classes) > num_classes:
        raise ConfigError(f"MODEL.NUM_CLASSES is {num_classes}, but the data has {len(train.classes)} classes")


class Digits:
    """The 1,797 handwritten digits that scikit-learn ships, 8 x 8; every fifth is for validation."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SetupError('DATASET digits needs scikit-learn: pip install "dropit[digits]"') from error
        digits = load_digits()
        chosen = (np.arange(len(digits.target)) % 5 != 0) == train
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8), of 0 to 16
        self.labels: list[int] = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.labels[index]


class Fake:
    """Random images, each a function of its index: to measure speed without a file."""

    SAMPLES = {True: 10_000, False: 1_000}  # noqa: RUF012

    def __init__(self, train: bool, size: int, num_classes: int) -> None:
        self.train, self.size = train, size
        self.classes = tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return self.SAMPLES[self.train]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        generator = np.random.default_rng((index, self.train))
        pixels = generator.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % len(self.classes)


class Folder(DatasetFolder):
    """Images in one directory a class; an unreadable one is an error or, with ``skip``, replaced by the next one.

    ``unreadable``: (n,) bool, the images found unreadable; in shared memory, since loader processes find them.
    """

    def __init__(self, path: str, *, skip: bool = False) -> None:
        super().__init__(path, read_image, EXTENSIONS)  # which calls make_dataset
        self.skip = skip
        self.unreadable = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: Any = None,
        is_valid_file: Any = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """Return paths and class numbers, sorted; no hidden file, and no directory twice where links lead to it again.

        Raises FileNotFoundError for a class without an image.
        """
        samples: list[tuple[str, int]] = []
        for name, label in sorted(class_to_idx.items()):
            found = list(_images(str(Path(directory, name)), ()))
            if not found:
                raise FileNotFoundError(f"no image in class {name} (of {', '.join(EXTENSIONS)})")
            samples += [(path, label) for path in found]
        return samples

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self.samples)):
            place = (index + step) % len(self.samples)
            path, label = self.samples[place]
            try:
                return read_image(path), label
            except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error, ...
                if not self.skip:
                    reason = " ".join(str(error).split())
                    raise SetupError(
                        f"{path}: cannot be read ({reason}); DATALOADER.UNREADABLE skip leaves such images out"
                    ) from error
            self.unreadable[place] = True
        raise SetupError(f"{self.root}: none of its {len(self.samples)} images can be read")

    @property
    def skipped(self) -> list[str]:
        """Return the paths of the images that were left out so far."""
        return [self.samples[place][0] for place in self.unreadable.nonzero().flatten().tolist()]


def _images(directory: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of the images below a directory, in order; ``above``: the directories that lead to it."""
    real = os.path.realpath(directory)
    if real in above:
        return
    with os.scandir(directory) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    yield from (entry.path for entry in shown if entry.name.lower().endswith(EXTENSIONS) and not _is_dir(entry))
    for entry in shown:
        if _is_dir(entry):
            yield from _images(entry.path, (*above, real))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_image(path: str) -> Image.Image:
    """Return the image in a file, upright and in RGB; 16 bits are scaled to 8.

    Raises what Pillow raises, and ValueError for what is no regular file, or has pixels of 32 bits.
    """
    if not Path(path).is_file():  # one can wait for a pipe forever
        raise ValueError("not a regular file" if Path(path).exists() else "no such file")
    # Of a file and not a path, which Pillow would map into memory: so it misreads TIFFs that lie on their side.
    with Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("pixels of 32 bits, of which nothing says what is white; 8 or 16 bits would do")
        image.load()  # which turns some by itself
        upright = ImageOps.exif_transpose(image)
        return (_scaled(upright) if image.mode.startswith("I") else upright).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    # Pillow's own conversion would clip all that is above 255.
    values = np.asarray(image).clip(0, 65535)
    return Image.fromarray((values / 257).round().astype(np.uint8))


class Cached:
    """Another data set, decoded once: images after the ``fixed`` steps, as one uint8 tensor (N, H, W, 3).

    A single tensor, because loader processes share its memory.
    """

    def __init__(self, source: Source, fixed: Steps) -> None:
        self.classes = source.classes
        self.labels: list[int] = []
        self.pixels = torch.empty(0, dtype=torch.uint8)
        for index in range(len(source)):
            image, label = source[index]
            self._keep(index, np.array(apply(fixed, image)), len(source))
            self.labels.append(label)

    def _keep(self, index: int, pixels: Any, samples: int) -> None:
        if not index:
            self.pixels = torch.empty((samples, *pixels.shape), dtype=torch.uint8)
        if self.pixels.shape[1:] != pixels.shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self.pixels.shape[1:3]
            raise ConfigError(
                f"DATALOADER.CACHE needs images of one size, but image {index} is {width} x {height} and the first "
                f"{first_width} x {first_height}: set it to false"
            )
        self.pixels[index] = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index].numpy()), self.labels[index]

    def tensor(self, index: int) -> tuple[Tensor, int]:
        """Return the image as (3, H, W) uint8, without a conversion by Pillow, and its label."""
        return self.pixels[index].permute(2, 0, 1), self.labels[index]


def _open_folder(path: str, key: str, unreadable: str) -> Folder:
    if not Path(path).is_dir():
        raise SetupError(f"{key} {path} is not a directory: expected {_tree(path)}")
    try:
        return Folder(path, skip=unreadable == "skip")
    except FileNotFoundError as error:  # no class, or a class without an image
        raise SetupError(f"{key} {path}: {' '.join(str(error).split())}; expected {_tree(path)}") from error


def _open_cifar(name: str, train: bool) -> Source:
    try:
        return _CIFAR[name](DOWNLOADS, train=train, download=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise SetupError(
            f"DATASET {name} is not in {DOWNLOADS} and could not be downloaded ({error}); "
            f"give TRAIN.PATH and VAL.PATH to read it from {_tree('DIR')}"
        ) from error


def _path_key(train: bool) -> str:
    return "TRAIN.PATH" if train else "VAL.PATH"


def _tree(path: str) -> str:
    return f"{path}/<class>/<image>.jpg"
