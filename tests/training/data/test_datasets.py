import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dropit.training.data.datasets import Cached, Digits, Fake, check_classes, open_dataset
from dropit.training.errors import ConfigError, SetupError


def folder(path, *, train=True, unreadable="fail"):
    return open_dataset("folder", str(path), train=train, unreadable=unreadable)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_digits_are_real_whole_and_split_without_overlap():
    train, val = Digits(True), Digits(False)
    assert (len(train), len(val)) == (1437, 360)
    assert set(train.labels) == set(val.labels) == set(range(10))
    image, label = train[0]
    assert (image.size, image.mode) == ((8, 8), "RGB")
    assert label == 1
    assert np.asarray(image).max() == 255


def test_fake_images_are_a_function_of_their_index_and_read_no_file():
    train, val = (open_dataset("fake", "no/such", train=train, size=24, num_classes=7) for train in (True, False))
    image, label = train[8]
    assert image.size == (24, 24)
    assert label == 1
    assert image == Fake(True, 24, 7)[8][0]
    assert image not in (train[9][0], val[8][0])
    assert np.asarray(image).std() == pytest.approx(256 / 12**0.5, rel=0.1)
    assert len(train.classes) == 7


@pytest.mark.parametrize("name", ["imagenet", "folder", "cifar10"])
def test_a_folder_of_images_is_read_by_class(image_tree, name):
    data = open_dataset(name, str(image_tree(per_class=2) / "train"), train=True)
    assert len(data) == 20
    assert data.classes == [str(digit) for digit in range(10)]
    image, label = data[5]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 2)


def test_jfif_is_a_name_of_jpeg(image_tree):
    tree = image_tree(per_class=1) / "train"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tree / "0" / "extra.JFIF", format="jpeg")
    data = folder(tree)
    assert len(data) == 11
    assert np.asarray(data[1][0])[0, 0, 0] > 250


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.uint8, 255)])
def test_grey_values_keep_their_range(tmp_path, dtype, top):
    values = np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16)
    (tmp_path / "grey").mkdir()
    Image.fromarray(values).save(tmp_path / "grey" / "0.png")
    pixels = np.asarray(folder(tmp_path)[0][0])
    assert np.array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(("dtype", "format"), [(np.int32, "TIFF"), (np.float32, "TIFF")])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype, format):
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.full((4, 4), 200, dtype)).save(tmp_path / "grey" / "0.tif", format)
    with pytest.raises(SetupError, match=r"0.tif: cannot be read \(pixels of 32 bits"):
        folder(tmp_path)[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_an_image_is_turned_upright(tmp_path, mode, suffix):
    """As its EXIF says: 6 is a quarter turn."""
    if mode == "I;16" and suffix == "jpg":
        pytest.skip("there is no such file")
    (tmp_path / "photo").mkdir()
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    lying = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "photo" / f"0.{suffix}", exif=exif)
    found = np.asarray(folder(tmp_path)[0][0])[..., 0].astype(int)
    assert found.shape == (3, 2)
    assert np.abs(found - np.rot90(pixels, -1)).max() <= (30 if suffix == "jpg" else 0)


def test_only_files_that_are_seen_are_images(tmp_path):
    """Neither hidden ones, as macOS leaves them beside others, nor directories; a link back is followed once."""
    (tmp_path / "data" / "cat" / "more").mkdir(parents=True)
    for name in ("b.png", "a.JPG", ".c.png", "._a.JPG", "more/d.png", "more/.e.png", "notes.txt"):
        Image.new("RGB", (2, 2)).save(tmp_path / "data" / "cat" / name, "PNG")
    (tmp_path / "data" / "cat" / "f.png").mkdir()
    (tmp_path / "data" / "cat" / "more" / "back").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "self").symlink_to("self")
    paths = [os.path.relpath(path, tmp_path / "data" / "cat") for path, _ in folder(tmp_path / "data").samples]
    assert paths == ["a.JPG", "b.png", "more/d.png"]


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "0.png")
    with pytest.raises(SetupError, match=r"0.png: cannot be read \(not a regular file\)"):
        folder(tmp_path)[0]


def test_a_file_of_another_format_is_not_opened_by_its_plugin(tmp_path):
    """Pillow hands EPS to Ghostscript, which runs programs."""
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "0.jpg", "EPS")
    with pytest.raises(SetupError, match=r"0.jpg: cannot be read \(cannot identify image file"):
        folder(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00\x00"])
def test_an_image_that_is_none_is_named(image_tree, content):
    path = image_tree(per_class=1) / "train" / "3" / "00.png"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"3/00.png: cannot be read .*; DATALOADER.UNREADABLE skip") as caught:
        folder(path.parent.parent)[3]
    assert "\n" not in str(caught.value)


def test_a_truncated_image_is_named(image_tree):
    path = image_tree(per_class=1) / "train" / "3" / "00.png"
    truncate(path)
    data = folder(path.parent.parent)
    assert data[2][1] == 2
    with pytest.raises(SetupError, match=r"3/00.png: cannot be read \(.*truncated"):
        data[3]


def test_an_unreadable_image_is_replaced_by_the_next_and_counted_once(image_tree):
    tree = image_tree(per_class=1) / "train"
    for digit in ("8", "9"):
        truncate(tree / digit / "00.png")
    data = folder(tree, unreadable="skip")
    assert data.skipped == []
    assert data[8][1] == data[9][1] == data[0][1] == 0
    assert data[8][0] == data[0][0]
    assert data.skipped == [str(tree / digit / "00.png") for digit in ("8", "9")]


def test_what_another_process_skips_is_counted_here(image_tree):
    tree = image_tree(per_class=1) / "train"
    truncate(tree / "4" / "00.png")
    data = folder(tree, unreadable="skip")
    process = multiprocessing.Process(target=data.__getitem__, args=(4,), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert data.skipped == [str(tree / "4" / "00.png")]


def test_a_folder_without_a_readable_image_is_an_error(image_tree):
    tree = image_tree(per_class=1, classes=2) / "train"
    for path in tree.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SetupError, match=r"train: none of its 2 images can be read"):
        folder(tree, unreadable="skip")[0]


def test_a_cache_gives_the_same_images_without_their_files(image_tree):
    tree = image_tree(per_class=2) / "train"
    data = folder(tree)
    plain = [data[index] for index in range(len(data))]
    cached = Cached(data, ())
    for path in tree.rglob("*.png"):
        path.unlink()
    assert [cached[index] for index in range(len(cached))] == plain
    assert cached.pixels.shape == (20, 32, 32, 3)
    assert cached.pixels.dtype == torch.uint8
    assert cached.classes == data.classes


def test_a_cache_takes_the_fixed_steps_once_and_for_all():
    digits = Digits(False)
    cached = Cached(digits, (v2.Resize((16, 16)),))
    assert cached[7] == (v2.Resize((16, 16))(digits[7][0]), digits[7][1])
    pixels, label = cached.tensor(7)
    assert torch.equal(pixels, v2.functional.pil_to_tensor(cached[7][0]))
    assert label == digits[7][1]


def test_a_cache_of_images_of_several_sizes_is_refused(image_tree):
    tree = image_tree(per_class=1) / "train"
    Image.new("RGB", (40, 30)).save(tree / "5" / "00.png")
    with pytest.raises(ConfigError, match=r"DATALOADER.CACHE .* image 5 is 40 x 30 and the first 32 x 32: set it to"):
        Cached(folder(tree), ())


def test_a_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(SetupError, match=r"TRAIN.PATH .*/no is not a directory: expected .*/no/<class>/<image>.jpg"):
        folder(tmp_path / "no")


def test_a_flat_folder_and_an_empty_class_are_refused(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(SetupError, match=r"VAL.PATH .* expected"):
        folder(tmp_path, train=False)
    (tmp_path / "cat").mkdir()
    with pytest.raises(SetupError, match=r"no image in class cat \(of .jpg, "):
        folder(tmp_path, train=False)


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_what_is_in_folders_needs_a_path(name):
    with pytest.raises(ConfigError, match=rf"VAL.PATH is not set: DATASET {name} is read from DIR/<class>"):
        open_dataset(name, "", train=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_cannot_be_downloaded_says_what_else_would_do(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(SetupError, match=rf"DATASET {name} .* downloaded \(no network\); give TRAIN.PATH and VAL.PATH"):
        open_dataset(name, "", train=True)


def test_classes_that_would_be_numbered_differently_are_refused(image_tree):
    tree = image_tree(per_class=1)
    train = folder(tree / "train")
    check_classes(train, train, 10)
    with pytest.raises(ConfigError, match=r"MODEL.NUM_CLASSES is 9, but the data has 10 classes"):
        check_classes(train, train, 9)
    (tree / "val" / "3").rename(tree / "val" / "three")
    with pytest.raises(ConfigError, match=r"differ in their classes: only one of them has '3'"):
        check_classes(train, folder(tree / "val", train=False), 10)
