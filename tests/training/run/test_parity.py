"""With dropping off, the trainer does what a loop of plain PyTorch does: 30 steps of each published recipe."""

import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from dropit.training.builders.data import build_data
from dropit.training.builders.model import build_module
from dropit.training.builders.trainer import build_trainer
from dropit.training.config.load import load
from dropit.training.model.architectures import vit_tiny

ROOT = Path(__file__).parents[3]
STEPS, PER_EPOCH = 30, 5


def cosine(peak, epochs, warmup):
    """Rises in a line from a tenth of the peak in the first epoch to the peak in the last of the warm-up."""

    def rate(epoch):
        if epoch < warmup:
            return peak * (0.1 + 0.9 * epoch / max(1, warmup - 1))
        return peak * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    return rate


def steps(peak, milestones, factor):
    return lambda epoch: peak * factor ** sum(epoch >= milestone for milestone in milestones)


def cifar_resnet18():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


RECIPES = {
    # the learning rate of an epoch, weight decay, and the model; a small one in place of ViT-B/16
    "cifar100/resnet18": (steps(0.1, (60, 120, 160), 0.2), 5e-4, cifar_resnet18, "resnet18"),
    "cifar100/vit_b": (cosine(0.03, 100, 10), 0.0, lambda: vit_tiny(10, 32), "vit_tiny"),
    "imagenet/resnet18": (
        steps(0.1, (30, 60), 0.1),
        1e-4,
        lambda: torchvision.models.resnet18(num_classes=10),
        "resnet18",
    ),
    "imagenet/vit_b": (cosine(0.01, 8, 1), 0.0, lambda: vit_tiny(10, 32), "vit_tiny"),
}


@pytest.fixture
def config(image_tree):
    tree = image_tree(per_class=4)

    def read(name, arch):
        small = ["MODEL.ARCH", arch, "MODEL.NUM_CLASSES", "10", "MODEL.PRETRAINED", "", "INPUT.SIZE", "32"]
        data = ["TRAIN.PATH", f"{tree}/train", "VAL.PATH", f"{tree}/val", "DATALOADER.NUM_WORKERS", "0"]
        run = ["NUM_GPUS", "1", "ACCELERATOR", "cpu", "SOLVER.BATCH_SIZE", str(40 // PER_EPOCH)]
        return load(ROOT / "configs" / f"{name}.yaml", [*small, *data, *run, "CHECK_VAL_EVERY_N_EPOCH", "1000"])

    return read


def by_hand(cfg, rate, weight_decay, build):
    """Losses and weights."""
    torch.manual_seed(42)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=0.9, weight_decay=weight_decay)
    data, losses = build_data(cfg), []
    loader = data.train_dataloader()
    for epoch in range(STEPS // PER_EPOCH):
        loader.sampler.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = rate(epoch)
        for batch in loader:
            images, labels = data.train.finish(batch)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model.state_dict()


def by_trainer(cfg):
    losses, rates = [], []
    data = build_data(cfg)
    classifier = build_module(cfg, convert=False)
    step = classifier.training_step

    def noted(batch, batch_idx):
        loss = step(batch, batch_idx)
        losses.append(loss.item())
        rates.append(classifier.optimizers().param_groups[0]["lr"])
        return loss

    classifier.training_step = noted
    trainer = build_trainer(cfg)
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(classifier, data)
    return losses, classifier.model.state_dict(), rates


@pytest.mark.parametrize("name", RECIPES)
def test_thirty_steps_are_those_of_a_plain_loop(config, name):
    rate, weight_decay, build, arch = RECIPES[name]
    cfg = config(name, arch)
    losses, weights, rates = by_trainer(cfg)
    expected_losses, expected_weights = by_hand(cfg, rate, weight_decay, build)
    assert len(losses) == STEPS
    assert rates == pytest.approx([rate(step // PER_EPOCH) for step in range(STEPS)], rel=1e-12)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for key, weight in expected_weights.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-6, msg=key)
