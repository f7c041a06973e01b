"""What happens to each image: crops, flips, automatic augmentation, normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from dropit.training.errors import ConfigError, SetupError, UserError, describe

Steps = tuple[v2.Transform, ...]
CROPS = ("none", "pad", "random_resized")
# AutoAugment's policies are named after the data sets that they were found on.
AUTO_AUGMENTS = ("", "randaugment", "trivialaugment", "imagenet", "cifar10", "svhn")
PADDING = 4


class PadCrop(v2.RandomCrop):
    """Crops at random from the image padded by reflection."""

    def __init__(self, size: int) -> None:
        super().__init__(size, padding=PADDING, padding_mode="reflect")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw where to crop; raises ConfigError where the image is too small."""
        height, width = F.get_size(flat_inputs[0])
        (size, _), smallest = self.size, min(height, width)
        if smallest <= PADDING or smallest + 2 * PADDING < size:
            raise ConfigError(
                f"TRAIN.CROP pad takes INPUT.SIZE {size} from an image padded by {PADDING}, but one is "
                f"{width} x {height}: TRAIN.CROP none resizes it"
            )
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params


@dataclass(frozen=True)
class ImageTransform:
    """The steps for an image: ``fixed`` ones, then ``random`` ones, normalization and erasing.

    The random steps draw from torch's generator on the CPU.
    """

    fixed: Steps
    random: Steps
    mean: Sequence[float]
    std: Sequence[float]
    erasing: v2.RandomErasing | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the model's input, (3, H, W) float32."""
        floats = self.normalize(F.pil_to_tensor(apply(self.random, apply(self.fixed, image))))
        return self.erasing(floats) if self.erasing else floats

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return normalized floats of uint8 pixels, (..., 3, H, W)."""
        floats = F.to_dtype(pixels, torch.float32, scale=True)
        normal: Tensor = F.normalize(floats, list(self.mean), list(self.std), inplace=True)
        return normal


def apply(steps: Steps, image: Image.Image) -> Image.Image:
    """Return the image after the steps; raises SetupError with the name of one that fails."""
    for step in steps:
        try:
            image = step(image)
        except UserError:
            raise
        except Exception as error:  # whatever torchvision raises
            size = " x ".join(map(str, image.size))
            raise SetupError(f"{type(step).__name__} fails on an image of {size} ({describe(error)})") from error
    return image


def train_transform(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: str,
    crop_scale: Sequence[float],
    flip: bool,
    auto_augment: str = "",
    magnitude: int = 9,
    erasing: float = 0.0,
) -> ImageTransform:
    """Return the transform of training images; see CROPS and AUTO_AUGMENTS. ``erasing``: its probability."""
    random: list[v2.Transform] = []
    if crop == "pad":
        random.append(PadCrop(size))
    elif crop == "random_resized":
        random.append(v2.RandomResizedCrop(size, scale=tuple(crop_scale), antialias=True))
    if flip:
        random.append(v2.RandomHorizontalFlip())
    if auto_augment:
        random.append(_auto_augment(auto_augment, magnitude))
    fixed = (_whole(size),) if crop == "none" else ()
    return ImageTransform(fixed, tuple(random), mean, std, v2.RandomErasing(erasing) if erasing else None)


def _auto_augment(name: str, magnitude: int) -> v2.Transform:
    bilinear = InterpolationMode.BILINEAR
    if name == "randaugment":
        return v2.RandAugment(magnitude=magnitude, interpolation=bilinear)
    if name == "trivialaugment":
        return v2.TrivialAugmentWide(interpolation=bilinear)
    return v2.AutoAugment(v2.AutoAugmentPolicy(name), interpolation=bilinear)


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float], *, resize: int) -> ImageTransform:
    """Return the transform of validation images: their centre after ``resize``, or if 0 the whole resized."""
    centre = (v2.Resize(resize, antialias=True), v2.CenterCrop(size))
    return ImageTransform(centre if resize else (_whole(size),), (), mean, std)


def _whole(size: int) -> v2.Transform:
    return v2.Resize((size, size), antialias=True)
