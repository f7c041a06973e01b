import pytest
import torch
from PIL import Image

from dropit.training.data.batches import BatchMix
from dropit.training.data.datasets import open_dataset
from dropit.training.data.samples import Key, Samples
from dropit.training.data.transforms import train_transform
from dropit.training.errors import ConfigError
from tests.training.data.images import HALF, keys, samples


def test_repeats_are_the_same_image_differently_changed():
    data = samples()
    batch = data.load([Key(0, 5, repeat) for repeat in range(3)])
    assert batch.labels.tolist() == [5, 5, 5]
    assert len(batch.images.unique(dim=0)) == 3


def test_the_device_gives_what_the_workers_would_give():
    slow, fast = samples(), samples(on_device=True, cache=True)
    wanted = [Key(2, index, 0) for index in range(20)]
    expected, batch = slow.load(wanted), fast.load(wanted)
    assert expected.images.dtype == torch.float32
    assert batch.images.dtype == torch.uint8
    torch.testing.assert_close(fast.finish(batch)[0], expected.images, rtol=0, atol=1e-6)


def test_another_seed_epoch_sample_or_repeat_changes_otherwise():
    def places(seed=1, epoch=0, repeat=0):
        wanted = [Key(epoch, index, repeat) for index in range(20)]
        return samples(on_device=True, seed=seed).load(wanted).places

    plain = places()
    assert torch.equal(places(), plain)
    assert len(plain.unique(dim=0)) > 10
    for other in (places(seed=2), places(epoch=1), places(repeat=1)):
        assert (other != plain).any(1).sum() > 15


def test_mixing_gives_soft_labels_that_differ_between_batches_and_processes():
    data = samples(mix=BatchMix(20, mixup=1.0), random=False)
    batches = [data.load(batch) for rank in range(2) for batch in keys(20, 5, rank=rank, world=2)]
    assert len({batch.seed for batch in batches}) == 4
    images, labels = data.finish(batches[0])
    again, _ = data.finish(data.load(keys(20, 5, rank=0, world=2)[0]))
    assert torch.equal(images, again)
    assert not torch.equal(images, batches[0].images)
    assert labels.shape == (5, 20)
    torch.testing.assert_close(labels.sum(1), torch.ones(5))


def test_images_of_several_sizes_cannot_be_cropped_on_the_device(image_tree):
    tree = image_tree(per_class=1) / "train"
    Image.new("RGB", (40, 30)).save(tree / "5" / "00.png")
    augment = train_transform(32, *HALF, crop="pad", crop_scale=(1, 1), flip=True)
    data = Samples(open_dataset("folder", str(tree), train=True), augment, on_device=True)
    with pytest.raises(ConfigError, match=r"DATALOADER.ON_DEVICE .* of 32 x 32 and of 40 x 30: set it to false"):
        data.load([Key(0, index, 0) for index in range(10)])
