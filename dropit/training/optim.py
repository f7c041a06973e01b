"""SGD and the learning rate of each epoch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and its schedule, in epochs."""

    lr: float
    max_epochs: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "multistep"  # or "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    warmup_factor: float = 0.1


def build_optimizer(parameters: Iterable[Parameter], recipe: Recipe) -> Optimizer:
    """SGD as the recipe says."""
    return SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def build_schedule(optimizer: Optimizer, recipe: Recipe) -> LRScheduler:
    """The schedule, to be stepped once an epoch.

    Warm-up rises from warmup_factor * lr in epoch 0 to lr in epoch warmup_epochs - 1, cosine goes on from there to zero
    in epoch max_epochs: lightning-bolts' LinearWarmupCosineAnnealingLR, epoch for epoch.
    """
    if recipe.schedule == "multistep":
        steps = MultiStepLR(optimizer, list(recipe.milestones), recipe.gamma)
        return ChainedScheduler([_warmup(optimizer, recipe), steps]) if recipe.warmup_epochs else steps
    # A run cut short, to try it out, may end within its warm-up.
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, recipe.max_epochs - recipe.warmup_epochs))
    if not recipe.warmup_epochs:
        return cosine
    return SequentialLR(optimizer, [_warmup(optimizer, recipe), cosine], milestones=[recipe.warmup_epochs])


def _warmup(optimizer: Optimizer, recipe: Recipe) -> LRScheduler:
    if recipe.warmup_epochs == 1:
        return ConstantLR(optimizer, recipe.warmup_factor, total_iters=1)
    return LinearLR(optimizer, recipe.warmup_factor, total_iters=recipe.warmup_epochs - 1)
