import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dropit.training.data import Digits, ImageData, check_classes, eval_transform, open_dataset, train_transform
from dropit.training.errors import ConfigError, SetupError

HALF = ([0.5] * 3, [0.5] * 3)
PLAIN = ([0.0] * 3, [1.0] * 3)


@pytest.fixture
def photo():
    """48 x 32 with a different value in each pixel."""
    values = np.arange(48 * 32 * 3, dtype=np.uint32) * 7 % 256
    return Image.fromarray(values.astype(np.uint8).reshape(32, 48, 3))


def test_digits_are_real_whole_and_split_without_overlap():
    identity = v2.Identity()
    train, val = Digits(True, identity), Digits(False, identity)
    assert (len(train), len(val)) == (1437, 360)
    assert set(train.labels) == set(val.labels) == set(range(10))
    image, label = train[0]
    assert image.size == (8, 8)
    assert label == 1
    assert np.asarray(image).max() == 255


def test_evaluation_resizes_the_whole_or_takes_the_centre(photo):
    whole = eval_transform(32, *HALF, resize=0)(photo)
    assert whole.shape == (3, 32, 32)
    assert -1 <= whole.min() < whole.max() <= 1
    centre = eval_transform(16, *PLAIN, resize=32)(photo)
    expected = torch.from_numpy(np.asarray(photo)[8:24, 16:32].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(centre, expected)


def test_evaluation_leaves_an_image_of_the_right_size_as_it_is(photo):
    square = photo.crop((0, 0, 32, 32))
    expected = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(eval_transform(32, *PLAIN, resize=0)(square), expected)


def test_values_are_normalized_by_channel(photo):
    plain = eval_transform(32, *PLAIN, resize=0)(photo)
    normal = eval_transform(32, [0.1, 0.2, 0.3], [0.5, 0.25, 2.0], resize=0)(photo)
    shift, scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(normal, (plain - shift) / scale)


def test_pad_reflects_by_four_and_crops(photo):
    square = photo.crop((0, 0, 32, 32))
    transform = train_transform(32, *PLAIN, crop="pad", crop_scale=(1, 1), flip=False)
    padded = np.pad(np.asarray(square), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[i : i + 32, j : j + 32].tobytes() for i in range(9) for j in range(9)}
    seen = {(transform(square) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes() for _ in range(50)}
    assert seen <= windows
    assert len(seen) > 10


def test_flip_flips_half_of_them(photo):
    square = photo.crop((0, 0, 32, 32))
    transform = train_transform(32, *PLAIN, crop="none", crop_scale=(1, 1), flip=True)
    straight = eval_transform(32, *PLAIN, resize=0)(square)
    outcomes = [transform(square) for _ in range(40)]
    flipped = sum(torch.equal(image, straight.flip(2)) for image in outcomes)
    assert flipped + sum(torch.equal(image, straight) for image in outcomes) == 40
    assert 8 < flipped < 32


def test_random_resized_takes_parts_of_the_given_share(photo):
    transform = train_transform(24, *PLAIN, crop="random_resized", crop_scale=(0.05, 0.1), flip=False)
    assert transform(photo).shape == (3, 24, 24)
    assert len({transform(photo).sum().item() for _ in range(5)}) == 5


def test_a_folder_of_images_is_read_by_class(image_tree):
    tree = image_tree(per_class=2)
    data = open_dataset("imagenet", str(tree / "train"), train=True, transform=eval_transform(32, *HALF, resize=0))
    assert len(data) == 20
    assert data.classes == [str(digit) for digit in range(10)]
    assert data[0][0].shape == (3, 32, 32)


def test_loaders_shuffle_training_and_not_validation(image_tree):
    tree = image_tree(per_class=4)
    transform = eval_transform(32, *HALF, resize=0)
    train, val = (open_dataset("imagenet", str(tree / s), train=True, transform=transform) for s in ("train", "val"))
    data = ImageData(train, val, batch_size=16)
    labels = torch.cat([batch[1] for batch in data.train_dataloader()])
    assert not torch.equal(labels, labels.sort().values)
    assert torch.equal(labels.sort().values, torch.cat([batch[1] for batch in data.val_dataloader()]))


def test_a_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(SetupError, match=r"TRAIN.PATH .*/no is not a directory: expected .*/no/<class>/<image>.jpg"):
        open_dataset("imagenet", str(tmp_path / "no"), train=True, transform=None)


def test_a_flat_folder_and_an_empty_class_are_refused(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(SetupError, match=r"VAL.PATH .* expected"):
        open_dataset("imagenet", str(tmp_path), train=False, transform=None)
    (tmp_path / "cat").mkdir()
    with pytest.raises(SetupError, match=r"Found no valid file for the classes cat"):
        open_dataset("imagenet", str(tmp_path), train=False, transform=None)


def test_imagenet_needs_a_path():
    with pytest.raises(ConfigError, match=r"TRAIN.PATH is not set"):
        open_dataset("imagenet", "", train=True, transform=None)


def test_cifar100_that_cannot_be_downloaded_says_what_else_would_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(SetupError, match=r"could not be downloaded \(no network\); give TRAIN.PATH and VAL.PATH"):
        open_dataset("cifar100", "", train=True, transform=None)


def test_classes_that_would_be_numbered_differently_are_refused(image_tree):
    tree = image_tree(per_class=1)
    train = open_dataset("imagenet", str(tree / "train"), train=True, transform=None)
    check_classes(train, train, 10)
    with pytest.raises(ConfigError, match=r"MODEL.NUM_CLASSES is 9, but the data has 10 classes"):
        check_classes(train, train, 9)
    (tree / "val" / "3").rename(tree / "val" / "three")
    val = open_dataset("imagenet", str(tree / "val"), train=False, transform=None)
    with pytest.raises(ConfigError, match=r"differ in their classes: only one of them has '3'"):
        check_classes(train, val, 10)
