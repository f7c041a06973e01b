"""Freeze parts of the model, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropit.training.errors import ConfigError, suggest


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freeze what the patterns name, parameters or whole modules (layer1, *.bn1, *.bias); returns how many elements.

    A BatchNorm whose parameters are all frozen normalizes by its running statistics in training, too, and keeps them.
    Raises ConfigError for a pattern that names nothing and where nothing is left to train.
    """
    for pattern in patterns:
        _check(model, pattern)
    frozen = [parameter for name, parameter in model.named_parameters() if _named(name, patterns)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"MODEL.FREEZE {list(patterns)} leaves nothing to train")
    for module in _frozen_norms(model, patterns):
        module.register_forward_pre_hook(_evaluate)  # a call of model.train() would undo one eval()
    return sum(parameter.numel() for parameter in frozen)


def _named(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the name, or that of a module around it."""
    parts = name.split(".")
    names = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in names)


def _frozen_norms(model: nn.Module, patterns: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the BatchNorms whose parameters are all named; one without any is named by its statistics."""
    for name, module in model.named_modules():
        owned = [own for own, _ in module.named_parameters()] or ["running_mean"]
        if isinstance(module, _BatchNorm) and all(_named(f"{name}.{own}", patterns) for own in owned):
            yield module


def _evaluate(module: nn.Module, args: Any) -> None:
    module.eval()


def _check(model: nn.Module, pattern: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not any(_named(name, [pattern]) for name in names) and not any(_frozen_norms(model, [pattern])):
        modules = [name for name, _ in model.named_modules() if name]
        raise ConfigError(f"MODEL.FREEZE {pattern!r} names no parameter{suggest(pattern, [*modules, *names], 3)}")
