import contextlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dropit.training.data.transforms import (
    AUTO_AUGMENTS,
    BatchMix,
    DeviceTransform,
    PadCrop,
    derive_seed,
    eval_transform,
    own_generator,
    train_transform,
)
from dropit.training.errors import ConfigError

HALF = ([0.5] * 3, [0.5] * 3)
PLAIN = ([0.0] * 3, [1.0] * 3)


@pytest.fixture
def photo():
    """48 x 32 with a different value in each pixel."""
    values = np.arange(48 * 32 * 3, dtype=np.uint32) * 7 % 256
    return Image.fromarray(values.astype(np.uint8).reshape(32, 48, 3))


@pytest.fixture
def square(photo):
    return photo.crop((0, 0, 32, 32))


def transform(size=32, values=PLAIN, *, crop="none", flip=False, **options):
    return train_transform(size, *values, crop=crop, crop_scale=(0.05, 0.1), flip=flip, **options)


def test_evaluation_resizes_the_whole_or_takes_the_centre(photo):
    whole = eval_transform(32, *HALF, resize=0)(photo)
    assert whole.shape == (3, 32, 32)
    assert -1 <= whole.min() < whole.max() <= 1
    centre = eval_transform(16, *PLAIN, resize=32)(photo)
    expected = torch.from_numpy(np.asarray(photo)[8:24, 16:32].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(centre, expected)


def test_evaluation_leaves_an_image_of_the_right_size_as_it_is(square):
    expected = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(eval_transform(32, *PLAIN, resize=0)(square), expected)


def test_values_are_normalized_by_channel(photo):
    plain = eval_transform(32, *PLAIN, resize=0)(photo)
    normal = eval_transform(32, [0.1, 0.2, 0.3], [0.5, 0.25, 2.0], resize=0)(photo)
    shift, scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(normal, (plain - shift) / scale)


def test_pad_reflects_by_four_and_crops(square):
    pad = transform(crop="pad")
    padded = np.pad(np.asarray(square), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[i : i + 32, j : j + 32].tobytes() for i in range(9) for j in range(9)}
    seen = {(pad(square) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() for _ in range(50)}
    assert seen <= windows
    assert len(seen) > 10


@pytest.mark.parametrize("side", [4, 23])
def test_pad_refuses_an_image_that_is_too_small_for_it(square, side):
    small = square.resize((side, 32))
    with pytest.raises(ConfigError, match=f"TRAIN.CROP pad takes INPUT.SIZE 32 .* {side} x 32: TRAIN.CROP none"):
        transform(crop="pad")(small)


def test_flip_flips_half_of_them(square):
    straight = eval_transform(32, *PLAIN, resize=0)(square)
    outcomes = [transform(flip=True)(square) for _ in range(40)]
    flipped = sum(torch.equal(image, straight.flip(2)) for image in outcomes)
    assert flipped + sum(torch.equal(image, straight) for image in outcomes) == 40
    assert 8 < flipped < 32


def test_random_resized_takes_parts_of_the_given_share(photo):
    parts = transform(24, crop="random_resized")
    assert parts(photo).shape == (3, 24, 24)
    assert len({parts(photo).sum().item() for _ in range(5)}) == 5


@pytest.mark.parametrize("name", AUTO_AUGMENTS[1:])
def test_each_automatic_augmentation_changes_images_at_random(square, name):
    augment = transform(auto_augment=name)
    outcomes = {augment(square).numpy().tobytes() for _ in range(20)}
    assert len(outcomes) > 5
    assert all(augment(square).shape == (3, 32, 32) for _ in range(3))


def test_a_larger_magnitude_changes_more():
    mild, strong = (transform(auto_augment="randaugment", magnitude=value).random[-1] for value in (3, 20))
    assert isinstance(mild, v2.RandAugment)
    assert (mild.magnitude, strong.magnitude) == (3, 20)


def test_erasing_blanks_a_part_of_that_share_of_the_images(square):
    plain = transform()(square)
    erased = [image for image in (transform(erasing=0.25)(square) for _ in range(80)) if not torch.equal(image, plain)]
    assert 8 < len(erased) < 36
    assert all((image[image != plain] == 0).all() for image in erased)


@pytest.mark.parametrize("crop", ["none", "pad"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_on_its_device_is_cropped_and_flipped_as_its_images_would_be(photo, crop, flip):
    images = [photo.crop((i, 0, i + 32, 32)) for i in range(16)]
    one_by_one = transform(values=HALF, crop=crop, flip=flip)
    whole = DeviceTransform(one_by_one)
    torch.manual_seed(1)
    expected = torch.stack([one_by_one(image) for image in images])
    torch.manual_seed(1)
    pixels = [whole.pixels(image) for image in images]
    places = torch.tensor([whole.place(image) for image in pixels])
    batch = torch.stack(pixels)
    assert batch.dtype == torch.uint8
    torch.testing.assert_close(whole(batch, places), expected, rtol=0, atol=1e-6)
    assert (len(places.unique(dim=0)) > 1) == (crop == "pad" or flip)


def test_a_batch_of_larger_and_oblong_images_is_cropped_as_they_would_be(photo):
    one_by_one = transform(24, crop="pad", flip=True)
    whole = DeviceTransform(one_by_one)
    for seed in range(10):
        torch.manual_seed(seed)
        expected = one_by_one(photo)
        torch.manual_seed(seed)
        pixels = whole.pixels(photo)
        got = whole(pixels[None], torch.tensor([whole.place(pixels)]))
        torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"auto_augment": "randaugment", "crop": "pad"}, {"crop": "random_resized"}])
def test_what_a_batch_cannot_do_is_done_image_by_image(photo, options):
    one_by_one = transform(flip=True, **options)
    whole = DeviceTransform(one_by_one)
    torch.manual_seed(1)
    expected = one_by_one(photo)
    torch.manual_seed(1)
    pixels = whole.pixels(photo)
    place = whole.place(pixels)
    assert place == (0, 0, 0)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(whole(pixels[None], torch.tensor([place]))[0], expected, rtol=0, atol=1e-6)


def test_erasing_on_the_device_is_refused():
    with pytest.raises(ConfigError, match=r"DATALOADER.ON_DEVICE cannot erase: set TRAIN.ERASING to 0"):
        DeviceTransform(transform(erasing=0.5))


def mixing_shares(mix, seeds=20):
    """Of constant images 0, 1, 2, 3: whether each batch was blended (MixUp) or pasted (CutMix)."""
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    kinds = []
    for seed in range(seeds):
        mixed, labels = mix(images, torch.arange(4), seed)
        # In both, a label's share is its image's share: of values, or of area.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels @ torch.arange(4.0))
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        kinds.append("mixup" if (mixed != mixed.round()).any() else "cutmix")
    return kinds


@pytest.mark.parametrize(
    ("alphas", "kinds"), [((1, 0), {"mixup"}), ((0, 1), {"cutmix"}), ((1, 1), {"mixup", "cutmix"})]
)
def test_mixing_shares_labels_as_it_shares_images(alphas, kinds):
    assert set(mixing_shares(BatchMix(4, mixup=alphas[0], cutmix=alphas[1]))) == kinds


def test_mixing_is_a_function_of_the_seed_and_draws_nothing_else():
    mix, images, labels = BatchMix(4, mixup=0.8, cutmix=1.0), torch.rand(4, 3, 8, 8), torch.arange(4)
    before = torch.get_rng_state()
    first, again, other = (mix(images, labels, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_generator_leaves_torchs_where_it_was():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with contextlib.suppress(ValueError), own_generator() as generator:
        generator.manual_seed(9)
        torch.rand(2)
        raise ValueError
    assert torch.equal(torch.rand(4), expected)


def test_seeds_depend_on_every_part_and_its_place():
    parts = [(1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 0), (12, 3), (0, 1, 2, 3)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*part) for part in parts]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_crop_takes_images_and_tensors_alike(square):
    torch.manual_seed(0)
    of_image = PadCrop(32).make_params([square])
    torch.manual_seed(0)
    of_tensor = PadCrop(32).make_params([F.pil_to_tensor(square)])
    assert (of_image["top"], of_image["left"]) == (of_tensor["top"], of_tensor["left"])
