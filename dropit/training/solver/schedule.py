"""The learning rate of each epoch."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dropit.training.solver.recipe import Recipe


def build_schedule(optimizer: Optimizer, recipe: Recipe) -> LRScheduler:
    """Return the schedule, to be stepped once an epoch; all groups change in proportion.

    Warm-up rises from warmup_factor * lr in epoch 0 to lr in epoch warmup_epochs - 1, cosine goes on from there to
    min_lr in epoch max_epochs: lightning-bolts' LinearWarmupCosineAnnealingLR, epoch for epoch.
    """
    return LambdaLR(optimizer, partial(_factor, recipe))


def _factor(recipe: Recipe, epoch: int) -> float:
    """Return the learning rate of an epoch as a fraction of the recipe's."""
    least = recipe.min_lr / recipe.lr
    if recipe.schedule == "cosine":
        # A run cut short, to try it out, may end within its warm-up.
        progress = max(0, epoch - recipe.warmup_epochs) / max(1, recipe.max_epochs - recipe.warmup_epochs)
        factor = least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2
    else:
        factor = max(least, recipe.gamma ** bisect_right(recipe.milestones, epoch))
    if epoch >= recipe.warmup_epochs:
        return factor
    done = epoch / max(1, recipe.warmup_epochs - 1)
    return factor * (recipe.warmup_factor + (1 - recipe.warmup_factor) * done)
