import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dropit.training.data.transforms import AUTO_AUGMENTS, PadCrop, eval_transform
from dropit.training.errors import ConfigError
from tests.training.data.images import HALF, PLAIN, transform


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


def test_a_crop_takes_images_and_tensors_alike(square):
    torch.manual_seed(0)
    of_image = PadCrop(32).make_params([square])
    torch.manual_seed(0)
    of_tensor = PadCrop(32).make_params([F.pil_to_tensor(square)])
    assert (of_image["top"], of_image["left"]) == (of_tensor["top"], of_tensor["left"])
