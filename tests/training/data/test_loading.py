from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from dropit.training.data.datasets import open_dataset
from dropit.training.data.loading import ImageData, Key, Loader, Samples, SharedBatches
from dropit.training.data.transforms import BatchMix, eval_transform, train_transform
from dropit.training.errors import ConfigError, SetupError

HALF = ([0.5] * 3, [0.5] * 3)


class Photos:
    """``count`` images of noise; the label is the index."""

    def __init__(self, count, size=16):
        self.classes = tuple(map(str, range(count)))
        self.size = size

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


def samples(count=20, *, seed=1, random=True, **options):
    augment = train_transform(16, *HALF, crop="pad", crop_scale=(1, 1), flip=True)
    return Samples(Photos(count), augment if random else eval_transform(16, *HALF, resize=0), seed=seed, **options)


def keys(count, batch_size, *, epoch=0, **options):
    batches = SharedBatches(samples(count, seed=options.pop("seed", 1)), batch_size, **{"train": True, **options})
    batches.set_epoch(epoch)
    taken = list(batches)
    assert len(taken) == len(batches)
    return taken


def flat(batches):
    return [key for batch in batches for key in batch]


def load(data, batches, workers=0):
    """What the model sees of the batches, joined."""
    loader = Loader(data, batch_size=None, sampler=batches, num_workers=workers)
    return torch.cat([data.finish(batch)[0] for batch in loader])


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own():
    first, again, second = keys(20, 8), keys(20, 8), keys(20, 8, epoch=1)
    assert first == again
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert [key.sample for key in flat(first)] != [key.sample for key in flat(second)]
    for epoch, batches in enumerate((first, second)):
        assert {key.epoch for key in flat(batches)} == {epoch}
        assert sorted(key.sample for key in flat(batches)) == list(range(20))
    assert flat(keys(20, 8, seed=2)) != flat(first)


def test_validation_is_in_order():
    assert flat(keys(20, 8, train=False, epoch=3)) == [Key(3, index, 0) for index in range(20)]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [24, 25, 47])
def test_processes_see_together_what_one_alone_would_see(world, train, count):
    alone = keys(count, 12, train=train)
    together = [keys(count, 12 // world, train=train, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in together}) == 1  # or one would wait for the others forever
    joined = [sorted(key for share in shares for key in share) for shares in zip(*together, strict=True)]
    if train:
        assert all(len({len(share) for share in shares}) == 1 for shares in zip(*together, strict=True))
        missing = [len(mixed) - len(whole) for mixed, whole in zip(joined, alone, strict=True)]
        filling = flat(alone)[: missing[-1]]
        assert joined == [sorted(whole) for whole in [*alone[:-1], alone[-1] + filling]]
        assert missing[:-1] == [0] * (len(alone) - 1)
    else:
        assert sorted(flat(joined)) == flat(alone)
        assert all(share for batches in together for share in batches)


def test_a_batch_of_one_in_validation_is_shared_out_whole():
    shares = [keys(5, 1, train=False, rank=rank, world=2) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[1, 2], [1, 1]]


def test_too_few_samples_for_the_processes_are_refused():
    with pytest.raises(SetupError, match="NUM_GPUS 3: the 2 validation images cannot be shared"):
        keys(2, 4, train=False, world=3)
    with pytest.raises(SetupError, match="NUM_GPUS 2: the 1 training image cannot be shared"):
        keys(1, 4, world=2)


def test_repeats_draw_an_image_several_times_in_a_row_in_an_epoch_of_the_same_length():
    drawn = flat(keys(20, 8, repeats=3))
    assert len(drawn) == 20
    assert [key.repeat for key in drawn] == ([0, 1, 2] * 7)[:20]
    rows = [{key.sample for key in drawn[start : start + 3]} for start in range(0, 18, 3)]
    assert [len(row) for row in rows] == [1] * 6
    assert len(set.union(*rows)) == 6


def test_repeats_are_the_same_image_differently_changed():
    data = samples()
    batch = data.load([Key(0, 5, repeat) for repeat in range(3)])
    assert batch.labels.tolist() == [5, 5, 5]
    assert len(batch.images.unique(dim=0)) == 3


def test_start_leaves_out_what_was_taken_and_only_in_its_epoch():
    batches = SharedBatches(samples(), 4, train=True)
    batches.set_epoch(1)
    whole = list(batches)
    batches.start = 2
    batches.set_epoch(1)
    assert list(batches) == whole[2:]
    assert len(batches) == 5
    batches.set_epoch(2)
    assert len(list(batches)) == 5


@pytest.mark.filterwarnings("ignore:.*will create 4 worker processes.*")
@pytest.mark.parametrize("on_device", [False, True])
def test_a_sample_does_not_depend_on_workers_processes_or_cache(on_device):
    def seen(*, workers=0, world=1, cache=False):
        data = samples(on_device=on_device, cache=cache)
        shares = []
        for rank in range(world):
            batches = SharedBatches(data, 8 // world, train=True, rank=rank, world=world)
            batches.set_epoch(3)
            shares.append(load(data, batches, workers))
        return torch.stack(shares, 1).flatten(0, 1)

    alone = seen()
    assert alone.shape == (20, 3, 16, 16)
    assert alone.dtype == torch.float32
    for options in ({"workers": 2}, {"workers": 4}, {"world": 2}, {"world": 2, "workers": 2}, {"cache": True}):
        assert torch.equal(seen(**options), alone), options


@pytest.mark.parametrize("on_device", [False, True])
def test_a_cache_reads_each_image_once(monkeypatch, on_device):
    read = []
    plain = Photos.__getitem__
    monkeypatch.setattr(Photos, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    data = samples(cache=True, on_device=on_device)
    for _ in range(2):
        load(data, SharedBatches(data, 8, train=True))
    assert sorted(read) == list(range(20))


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


def test_loading_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    data = ImageData(samples(mix=BatchMix(20, mixup=1.0)), samples(random=False), batch_size=8)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert [data.train.finish(batch)[0].shape[0] for batch in loader] == [8, 8, 4]
    data.sample()
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_one_line(image_tree, workers):
    tree = image_tree(per_class=1) / "train"
    (tree / "3" / "00.png").write_bytes(b"")
    data = Samples(open_dataset("folder", str(tree), train=True), eval_transform(32, *HALF, resize=0))
    loader = ImageData(data, data, batch_size=4, num_workers=workers).train_dataloader()
    with pytest.raises(SetupError, match=r"3/00.png: cannot be read") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_counted_over_workers_and_both_sets(image_tree, workers):
    tree = image_tree(per_class=1)
    sets = {}
    for part, digit in (("train", "3"), ("val", "7")):
        (tree / part / digit / "00.png").write_bytes(b"")
        source = open_dataset("folder", str(tree / part), train=part == "train", unreadable="skip")
        sets[part] = Samples(source, eval_transform(32, *HALF, resize=0))
    data = ImageData(**sets, batch_size=4, num_workers=workers)
    for _ in range(2):
        labels = torch.cat([batch.labels for batch in data.train_dataloader()])
        assert sorted(labels.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    list(data.val_dataloader())
    assert data.skipped == [str(tree / "train/3/00.png"), str(tree / "val/7/00.png")]


def test_images_of_several_sizes_cannot_be_cropped_on_the_device(image_tree):
    tree = image_tree(per_class=1) / "train"
    Image.new("RGB", (40, 30)).save(tree / "5" / "00.png")
    augment = train_transform(32, *HALF, crop="pad", crop_scale=(1, 1), flip=True)
    data = Samples(open_dataset("folder", str(tree), train=True), augment, on_device=True)
    with pytest.raises(ConfigError, match=r"DATALOADER.ON_DEVICE .* of 32 x 32 and of 40 x 30: set it to false"):
        data.load([Key(0, index, 0) for index in range(10)])


def test_workers_persist_and_fetch_ahead_as_told():
    loader = ImageData(samples(), samples(), batch_size=4, num_workers=2, prefetch=3).train_dataloader()
    assert (loader.persistent_workers, loader.prefetch_factor, loader.pin_memory) == (True, 3, False)


@pytest.mark.parametrize(("processes", "steps"), [(1, 3), (2, 2), (3, 1)])
def test_steps_are_those_of_the_loader(processes, steps):
    data = ImageData(samples(20), samples(), batch_size=8)
    assert data.steps_per_epoch(processes) == steps
    assert processes > 1 or len(list(data.train_dataloader())) == steps


def test_a_sample_is_from_all_over_the_data():
    images, labels = ImageData(samples(20), samples(), batch_size=5).sample()
    assert labels.tolist() == [0, 4, 9, 14, 19]
    assert images.shape == (5, 3, 16, 16)


class Learner(LightningModule):
    """A small network that remembers the batches it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(3 * 16 * 16, 20))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((images.clone(), labels.clone()))
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SaveAfter(Callback):
    """Writes a checkpoint after each step, as DIR/<step>.ckpt."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


def fit(workers, *, checkpoint=None, directory=None, **options):
    train = samples(mix=BatchMix(20, mixup=1.0, cutmix=1.0), **options)
    data = ImageData(train, samples(random=False), batch_size=8, num_workers=workers)
    learner = Learner()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[SaveAfter(directory)] if directory else None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, data, ckpt_path=checkpoint, weights_only=True)
    return learner


def same(ours, others):
    return len(ours) == len(others) and all(
        torch.equal(one, other) for pair in zip(ours, others, strict=True) for one, other in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_each_epochs_own_batches(workers):
    learner = fit(workers)
    data = samples(mix=BatchMix(20, mixup=1.0, cutmix=1.0))
    expected = [data.finish(data.load(batch)) for epoch in range(3) for batch in keys(20, 8, epoch=epoch)]
    assert same(learner.seen, expected)
    assert learner.seen[0][1].shape == (8, 20)
    assert torch.cat(learner.validated).tolist() == list(range(20)) * 3


def test_batches_of_another_size_go_on_at_an_epochs_end_alone():
    data = samples()
    one, other = (ImageData(data, data, batch_size=size).train_dataloader() for size in (8, 4))
    batches = iter(one)
    next(batches)
    with pytest.raises(ConfigError, match=r"after 1 batches of 8 images: .* must be 8 again, not 4"):
        other.load_state_dict(one.state_dict())
    assert len(list(batches)) == 2
    other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_goes_on_as_if_it_had_not_stopped(tmp_path, workers):
    whole = fit(workers, on_device=True, directory=tmp_path)
    for steps in (1, 3, 5):  # the second is at an epoch's end
        rest = fit(workers, on_device=True, checkpoint=tmp_path / f"{steps}.ckpt")
        assert same(rest.seen, whole.seen[steps:])
        for one, other in zip(rest.parameters(), whole.parameters(), strict=True):
            assert torch.equal(one, other)


def test_half_precision_reaches_what_is_made_on_the_device():
    data = ImageData(samples(on_device=True), samples(random=False), batch_size=8)
    data.trainer = Trainer(accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False)
    data.trainer.training = True
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert (images.dtype, labels.dtype) == (torch.bfloat16, torch.int64)


def test_each_process_takes_its_own_share_to_its_own_device():
    data = ImageData(samples(), samples(), batch_size=4)

    strategy = SimpleNamespace(root_device=torch.device("cuda", 1))
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, strategy=strategy)
    assert data.train_dataloader().pin_memory
    assert list(data.train_dataloader().sampler) == keys(20, 4, rank=1, world=2)
    assert list(data.val_dataloader().sampler) == keys(20, 4, train=False, rank=1, world=2)
