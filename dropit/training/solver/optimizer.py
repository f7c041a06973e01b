"""The optimizer, its groups of parameters, and the learning rate of each epoch."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dropit.training.errors import ConfigError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("multistep", "cosine")
# Kinds of parameters that weight decay may leave out: those of normalization layers, every bias, and position
# embeddings with class tokens.
NO_DECAY = ("norm", "bias", "position")
_POSITION = re.compile(r"pos_embed|position_embed|relative_position|class_embed|(cls|class|dist\w*|reg\w*|mask)_token")


@dataclass(frozen=True)
class Recipe:
    """The optimizer and its schedule, in epochs; raises ConfigError for values that exclude each other."""

    lr: float
    max_epochs: int
    optimizer: str = "sgd"  # of OPTIMIZERS
    momentum: float = 0.9  # of sgd
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()  # of NO_DECAY
    layer_decay: float = 1.0  # factor from one block's learning rate to that of the block before
    schedule: str = "multistep"  # of SCHEDULES
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ConfigError(
                "SOLVER.NESTEROV needs SOLVER.OPTIMIZER sgd and SOLVER.MOMENTUM above 0, got "
                f"{self.optimizer} and {self.momentum:g}"
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"SOLVER.MIN_LR must be at most SOLVER.LR ({self.lr:g}), got {self.min_lr:g}")


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over the parameters that are not frozen."""
    parameters = parameter_groups(model, recipe)
    if recipe.optimizer == "adamw":
        return AdamW(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group for each learning rate and weight decay, of what is not frozen; named if there are several."""
    depths = layer_depths(model) if recipe.layer_decay != 1 else {}
    last = max(depths.values(), default=0)
    spared = _spared(model, recipe.no_decay) if recipe.weight_decay else set()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths.get(name, last)
        parts = [f"depth{depth}"] * bool(depths) + ["no_decay"] * (name in spared)
        label = "_".join(parts) or "decay"
        rate = recipe.lr * recipe.layer_decay ** (last - depth)
        decay = 0.0 if name in spared else recipe.weight_decay
        groups.setdefault(label, {"params": [], "lr": rate, "weight_decay": decay, "name": label})
        groups[label]["params"].append(parameter)
    if len(groups) == 1:
        groups[label].pop("name")  # LearningRateMonitor's tag is then the optimizer's alone
    return list(groups.values())


def _spared(model: nn.Module, kinds: Iterable[str]) -> set[str]:
    """The names of the parameters that are of one of the kinds."""
    return {
        name
        for fqn, module in model.named_modules()
        for name, _ in module.named_parameters(fqn, recurse=False)
        if any(_is_kind(kind, name, module) for kind in kinds)
    }


def _is_kind(kind: str, name: str, module: nn.Module) -> bool:
    if kind == "norm":
        return "norm" in type(module).__name__.lower()
    if kind == "bias":
        return name.endswith("bias")
    return _POSITION.search(name) is not None


def layer_depths(model: nn.Module) -> dict[str, int]:
    """How deep each parameter lies: 0 before the first block, k from the k-th block to the next, n + 1 after the last.

    A block is one of several modules of the same type that hold others, not within another such; a model without any
    counts each layer that has parameters. Modules are taken to be in the order of their definition.
    """
    blocks = _blocks(model)
    names = [name for name, _ in model.named_parameters()]
    owners = [next((block for block in blocks if name.startswith(f"{block}.")), None) for name in names]
    order = {owner: depth for depth, owner in enumerate(dict.fromkeys(filter(None, owners)), 1)}
    end = max(index for index, owner in enumerate(owners) if owner is not None)
    depths, depth = {}, 0
    for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
        depth = order[owner] if owner is not None else depth
        depths[name] = depth if index <= end else len(order) + 1
    return depths


def _blocks(model: nn.Module) -> list[str]:
    """The blocks' names, or those of all layers that have parameters."""
    composite = {
        fqn: type(module)
        for fqn, module in model.named_modules()
        if any(True for child in module.children() for _ in child.parameters())
        and type(module) not in (nn.Sequential, nn.ModuleList)
        and "stage" not in type(module).__name__.lower()  # a stage is made of blocks
    }
    counts = Counter(composite.values())
    repeated = [fqn for fqn, kind in composite.items() if counts[kind] > 1]
    outer = [fqn for fqn in repeated if not any(fqn.startswith(f"{other}.") for other in repeated)]
    return outer or [fqn for fqn, module in model.named_modules() if list(module.parameters(recurse=False))]


def build_schedule(optimizer: Optimizer, recipe: Recipe) -> LRScheduler:
    """The schedule, to be stepped once an epoch; all groups change in proportion.

    Warm-up rises from warmup_factor * lr in epoch 0 to lr in epoch warmup_epochs - 1, cosine goes on from there to
    min_lr in epoch max_epochs: lightning-bolts' LinearWarmupCosineAnnealingLR, epoch for epoch.
    """
    return LambdaLR(optimizer, partial(_factor, recipe))


def _factor(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch, as a part of the recipe's."""
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
