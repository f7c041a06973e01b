import pytest
import torch

from dropit.training.data.batches import BatchMix, DeviceTransform
from dropit.training.errors import ConfigError
from tests.training.data.images import HALF, transform


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
