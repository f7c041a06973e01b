"""The optimizer and its groups of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dropit.training.solver.depths import layer_depths
from dropit.training.solver.recipe import Recipe

_POSITION = re.compile(r"pos_embed|position_embed|relative_position|class_embed|(cls|class|dist\w*|reg\w*|mask)_token")


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer for the parameters that are not frozen."""
    parameters = parameter_groups(model, recipe)
    if recipe.optimizer == "adamw":
        return AdamW(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return one group for each learning rate and weight decay, named if there are several; without frozen ones."""
    depths = layer_depths(model) if recipe.layer_decay != 1 else {}
    last = max(depths.values(), default=0)
    without_decay = names_without_decay(model, recipe.no_decay) if recipe.weight_decay else set()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths.get(name, last)
        parts = [f"depth{depth}"] * bool(depths) + ["no_decay"] * (name in without_decay)
        label = "_".join(parts) or "decay"
        rate = recipe.lr * recipe.layer_decay ** (last - depth)
        decay = 0.0 if name in without_decay else recipe.weight_decay
        groups.setdefault(label, {"params": [], "lr": rate, "weight_decay": decay, "name": label})
        groups[label]["params"].append(parameter)
    if len(groups) == 1:
        groups[label].pop("name")  # LearningRateMonitor's tag is then lr- and the optimizer's name
    return list(groups.values())


def names_without_decay(model: nn.Module, kinds: Iterable[str]) -> set[str]:
    """Return the names of the parameters of these kinds (of NO_DECAY)."""
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
