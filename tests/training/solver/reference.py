"""What the tests of the solver share: rates by hand, and a small network."""

import math

from torch import nn

from dropit.training.solver.optimizer import build_optimizer
from dropit.training.solver.schedule import build_schedule


def rates(recipe):
    """The learning rate of each epoch."""
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    schedule = build_schedule(optimizer, recipe)
    out = []
    for _ in range(recipe.max_epochs):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def warmup_cosine(epoch, lr, warmup, epochs, least=0.0):
    """By hand: linear from 0.1 lr to lr in epoch W - 1, then half a cosine that ends at E."""
    if epoch < warmup:
        return 0.1 * lr + 0.9 * lr * epoch / max(1, warmup - 1)
    return least + (lr - least) * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


def multistep(lr, factor, *milestones):
    return lambda epoch: lr * factor ** sum(epoch >= milestone for milestone in milestones)


# What the first release published: the rate of an epoch, and the weight decay.
PUBLISHED = {
    "cifar100/resnet18": (multistep(0.1, 0.2, 60, 120, 160), 5e-4),
    "cifar100/vit_b": (lambda epoch: warmup_cosine(epoch, 0.03, 10, 100), 0.0),
    "imagenet/resnet18": (multistep(0.1, 0.1, 30, 60), 1e-4),
    "imagenet/vit_b": (lambda epoch: warmup_cosine(epoch, 0.01, 1, 8), 0.0),
}


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
