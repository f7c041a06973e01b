"""Convert a model's layers as the section DROPIT says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from yacs.config import CfgNode

import dropit
from dropit.training.builders.machine import autocast, pick_device
from dropit.training.errors import ConfigError, suggest
from dropit.training.model.classifier import Batch


def convert_layers(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Convert the layers of ``model`` with DROPIT.GAMMA and DROPIT.COMPRESS. In place; returns the model."""
    _check_skipped(model, cfg)
    with _named_in_errors(f"MODEL.DROPIT with DROPIT.SKIP {cfg.DROPIT.SKIP}"):
        return dropit.to_dropit(model, gamma=cfg.DROPIT.GAMMA, compress=cfg.DROPIT.COMPRESS, **_options(cfg))


def fit_budget(model: nn.Module, cfg: CfgNode, sample: Batch) -> nn.Module:
    """Convert the layers of ``model`` so that what ``sample`` saves for backward fits into DROPIT.BUDGET_MB.

    In place; returns the model, on the device that it will train on, where the settings are measured.
    """
    _check_skipped(model, cfg)
    images, labels = (tensor.to(pick_device(cfg)) for tensor in sample)
    # In fp16 small gradients would be 0. Only the ratios of the errors matter.
    scale = 2.0**12 if cfg.TRAIN.PRECISION == "fp16" else 1.0
    model.to(images.device).train()
    with _named_in_errors("DROPIT.BUDGET_MB"), autocast(cfg):
        return dropit.fit_budget(
            model,
            int(cfg.DROPIT.BUDGET_MB * 2**20),
            images,
            loss_fn=lambda logits: scale * cross_entropy(logits, labels),
            gamma_min=cfg.DROPIT.GAMMA_MIN,
            gamma_max=cfg.DROPIT.GAMMA_MAX,
            on_step=_progress(),
            **_options(cfg),
        )


def _check_skipped(model: nn.Module, cfg: CfgNode) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in cfg.DROPIT.SKIP:
        if not any(fnmatch(name, pattern) for name in names):
            raise ConfigError(f"DROPIT.SKIP {pattern!r} names no layer{suggest(pattern, names, 3)}")


def _options(cfg: CfgNode) -> dict[str, Any]:
    skipped = cfg.DROPIT.SKIP
    return {
        "strategy": cfg.DROPIT.STRATEGY,
        "block_size": cfg.DROPIT.D if cfg.DROPIT.D and cfg.DROPIT.STRATEGY == "fastmink" else None,
        "value_dtype": cfg.DROPIT.VALUE_DTYPE or None,
        "filter_fn": lambda module, fqn: not any(fnmatch(fqn, pattern) for pattern in skipped),
    }


@contextmanager
def _named_in_errors(keys: str) -> Iterator[None]:
    """Raise the library's ValueError as a ConfigError that names the keys."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}") from error


def _progress() -> Callable[[int, int], None]:
    """Return a callback that shows a bar on a terminal, and then prints a line, in the first process."""
    bar = tqdm(desc="budget", unit="step", leave=False, disable=True if rank_zero_only.rank else None)  # type: ignore[attr-defined]

    def show(step: int, steps: int) -> None:
        bar.total = steps
        bar.update()
        if step == steps:
            bar.close()
            rank_zero_only(print)(f"budget       measured in {steps} steps on one batch")

    return show
