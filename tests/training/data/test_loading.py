from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from dropit.training.data.batches import BatchMix
from dropit.training.data.datasets import open_dataset
from dropit.training.data.loading import ImageData, Loader
from dropit.training.data.sampler import SharedBatches
from dropit.training.data.samples import Samples
from dropit.training.data.transforms import eval_transform
from dropit.training.errors import ConfigError, SetupError
from tests.training.data.images import HALF, Photos, keys, samples


def load(data, batches, workers=0):
    """What the model sees of the batches, joined."""
    loader = Loader(data, batch_size=None, sampler=batches, num_workers=workers)
    return torch.cat([data.finish(batch)[0] for batch in loader])


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


def test_loading_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    data = ImageData(samples(mix=BatchMix(20, mixup=1.0)), samples(random=False), batch_size=8)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert [data.train.finish(batch)[0].shape[0] for batch in loader] == [8, 8, 4]
    data.sample()
    assert torch.equal(torch.get_rng_state(), before)


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


def test_workers_persist():
    loader = ImageData(samples(), samples(), batch_size=4, num_workers=2).train_dataloader()
    assert (loader.persistent_workers, loader.pin_memory) == (True, False)


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
