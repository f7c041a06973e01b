"""What happens to an image, one by one or a whole batch at once, and to a batch of images and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from dropit.training.errors import ConfigError

Steps = tuple[v2.Transform, ...]
Place = tuple[int, int, int]  # top and left of a crop, from the padded image's corner; 1 if it is flipped
CROPS = ("none", "pad", "random_resized")
# AutoAugment's policies go by the data set that they were found on.
AUTO_AUGMENTS = ("", "randaugment", "trivialaugment", "imagenet", "cifar10", "svhn")
PADDING = 4


def derive_seed(*parts: int) -> int:
    """A seed of 32 bits, which is a function of the parts and of nothing else."""
    # One is needed for every sample: a tenth of the time of NumPy's SeedSequence.
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


@contextmanager
def own_generator() -> Iterator[torch.Generator]:
    """Torch's generator on the CPU, to be seeded at will: it goes on afterwards as if nothing had been drawn."""
    # Not torch.manual_seed, which would seed the generators of the GPUs as well.
    state = torch.get_rng_state()
    try:
        yield torch.default_generator
    finally:
        torch.set_rng_state(state)


class PadCrop(v2.RandomCrop):
    """A random part of the image, which is reflected at its edges."""

    def __init__(self, size: int) -> None:
        super().__init__(size, padding=PADDING, padding_mode="reflect")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where to crop; raises ConfigError where the image is too small for it."""
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
    """What an image goes through: ``fixed`` steps, each time the same, then ``random`` ones, then normalization.

    The random steps draw from torch's generator on the CPU.
    """

    fixed: Steps
    random: Steps
    mean: Sequence[float]
    std: Sequence[float]
    erasing: v2.RandomErasing | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as the model sees it, (3, H, W) float32."""
        floats = self.normalize(F.pil_to_tensor(apply(self.random, apply(self.fixed, image))))
        return self.erasing(floats) if self.erasing else floats

    def normalize(self, pixels: Tensor) -> Tensor:
        """Floats of uint8 pixels, (..., 3, H, W)."""
        floats = F.to_dtype(pixels, torch.float32, scale=True)
        normal: Tensor = F.normalize(floats, list(self.mean), list(self.std), inplace=True)
        return normal


def apply(steps: Steps, image: Image.Image) -> Image.Image:
    """The image after the steps."""
    for step in steps:
        image = step(image)
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
    """What a training image goes through; see CROPS and AUTO_AUGMENTS. ``erasing``: the probability of it."""
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
    """What a validation image goes through: its centre if ``resize`` is given, or the whole image resized."""
    centre = (v2.Resize(resize, antialias=True), v2.CenterCrop(size))
    return ImageTransform(centre if resize else (_whole(size),), (), mean, std)


def _whole(size: int) -> v2.Transform:
    return v2.Resize((size, size), antialias=True)


class DeviceTransform:
    """An ImageTransform in two parts: ``pixels`` and ``place`` of each image, and a call for the batch, on its device.

    The batch is padded, cropped, flipped and normalized at once, with the numbers that each image's own steps would
    have drawn. Where there are other random steps, all of them are taken image by image, and the batch is normalized.
    """

    def __init__(self, transform: ImageTransform) -> None:
        if transform.erasing:
            raise ConfigError("DATALOADER.ON_DEVICE cannot erase: set TRAIN.ERASING to 0, or ON_DEVICE to false")
        self.normalize = transform.normalize
        movable = all(isinstance(step, (PadCrop, v2.RandomHorizontalFlip)) for step in transform.random)
        self.early = transform.fixed + (() if movable else transform.random)
        late = transform.random if movable else ()
        self.crop = next((step for step in late if isinstance(step, PadCrop)), None)
        self.flip = next((step for step in late if isinstance(step, v2.RandomHorizontalFlip)), None)

    def pixels(self, image: Image.Image) -> Tensor:
        """The image as it travels, (3, H, W) uint8."""
        pixels: Tensor = F.pil_to_tensor(apply(self.early, image))
        return pixels

    def place(self, pixels: Tensor) -> Place:
        """Where the image is to be cropped, and whether it is to be flipped."""
        top = left = flipped = 0
        if self.crop:
            params = self.crop.make_params([pixels])
            top, left = params["top"], params["left"]
        if self.flip:
            flipped = int(torch.rand(1) < self.flip.p)
        return top, left, flipped

    def __call__(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Floats of (N, 3, H, W) uint8 pixels; ``places``: (N, 3), of each image's ``place``."""
        if self.crop:
            pixels = crop_and_flip(pixels, places, self.crop.size[0], PADDING)
        elif self.flip:
            pixels = crop_and_flip(pixels, places, pixels.shape[-1], 0)
        return self.normalize(pixels)


def crop_and_flip(images: Tensor, places: Tensor, size: int, padding: int) -> Tensor:
    """Of each of (N, C, H, W) images, reflected by ``padding``, the square at its own place: ``places`` is (N, 3)."""
    top, left, flipped = places[:, :, None].unbind(1)  # (N, 1)
    steps = torch.arange(size, device=images.device)
    rows = _reflect(top + steps - padding, images.shape[2])  # (N, size)
    columns = _reflect(left + torch.where(flipped > 0, steps.flip(0), steps) - padding, images.shape[3])
    pixels = rows[:, :, None] * images.shape[3] + columns[:, None, :]  # (N, size, size), in the flattened image
    chosen = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    squares: Tensor = images.flatten(2).gather(2, chosen).unflatten(2, (size, size))
    return squares


def _reflect(places: Tensor, length: int) -> Tensor:
    """Places outside of [0, length) mirrored at the first and the last."""
    last = length - 1
    return last - (last - places.abs()).abs()


class BatchMix:
    """MixUp, CutMix or, where both are given, one of them at random for each batch; 0 leaves one out."""

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.mix = v2.RandomChoice(
            [kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds if alpha]
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixed images and their soft labels, (N, num_classes), of class numbers (N,)."""
        with own_generator() as generator:
            generator.manual_seed(seed)
            images, labels = self.mix(images, labels)
        return images, labels
