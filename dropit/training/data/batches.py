"""What happens to a whole batch at once, on its device: crop, flip and normalize; MixUp and CutMix."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dropit.training.data.seeding import preserved_generator
from dropit.training.data.transforms import PADDING, ImageTransform, PadCrop, apply
from dropit.training.errors import ConfigError

Place = tuple[int, int, int]  # top and left of a crop, from the padded image's corner; 1 if it is flipped


class DeviceTransform:
    """An ImageTransform in two parts: ``pixels`` and ``place`` for each image, and a call for the batch on its device.

    The batch is padded, cropped, flipped and normalized at once, with the random numbers that the transform would have
    drawn for each image. With other random steps, all are applied image by image, and the batch is only normalized.
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
        """Return the image as the loader transfers it, (3, H, W) uint8."""
        pixels: Tensor = F.pil_to_tensor(apply(self.early, image))
        return pixels

    def place(self, pixels: Tensor) -> Place:
        """Draw where the image is cropped and whether it is flipped."""
        top = left = flipped = 0
        if self.crop:
            params = self.crop.make_params([pixels])
            top, left = params["top"], params["left"]
        if self.flip:
            flipped = int(torch.rand(1) < self.flip.p)
        return top, left, flipped

    def __call__(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Return floats of (N, 3, H, W) uint8 pixels; ``places``: (N, 3), the ``place`` of each image."""
        if self.crop:
            pixels = crop_and_flip(pixels, places, self.crop.size[0], PADDING)
        elif self.flip:
            pixels = crop_and_flip(pixels, places, pixels.shape[-1], 0)
        return self.normalize(pixels)


def crop_and_flip(images: Tensor, places: Tensor, size: int, padding: int) -> Tensor:
    """Return the square of each (N, C, H, W) image, reflected by ``padding``, at its place; ``places``: (N, 3)."""
    top, left, flipped = places[:, :, None].unbind(1)  # (N, 1)
    steps = torch.arange(size, device=images.device)
    rows = _reflect(top + steps - padding, images.shape[2])  # (N, size)
    columns = _reflect(left + torch.where(flipped > 0, steps.flip(0), steps) - padding, images.shape[3])
    pixels = rows[:, :, None] * images.shape[3] + columns[:, None, :]  # (N, size, size), in the flattened image
    chosen = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    squares: Tensor = images.flatten(2).gather(2, chosen).unflatten(2, (size, size))
    return squares


def _reflect(places: Tensor, length: int) -> Tensor:
    """Return indices with those outside of [0, length) mirrored at the first and the last."""
    last = length - 1
    return last - (last - places.abs()).abs()


class BatchMix:
    """Applies MixUp, CutMix or, if both alphas are above 0, one of them at random to each batch."""

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.mix = v2.RandomChoice(
            [kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds if alpha]
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and their soft labels, (N, num_classes); ``labels``: class numbers (N,)."""
        with preserved_generator() as generator:
            generator.manual_seed(seed)
            images, labels = self.mix(images, labels)
        return images, labels
