"""What to do where a device has too little memory: what a step needs, and what it would need with other settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from dropit import CacheMeter, estimate_cache
from dropit.training.builders.conversion import convert_layers
from dropit.training.builders.machine import batch_size
from dropit.training.builders.model import build_network, optimizer_slots
from dropit.training.errors import SetupError
from dropit.training.model.sizes import build_on_meta, step_memory

MIB = 2**20
_QUANTIZED = ("int8", "int4", "int2")  # from the most exact on


def is_of_memory(error: BaseException) -> bool:
    """Return whether memory could not be allocated, on a GPU or on the CPU."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def out_of_memory(cfg: CfgNode, error: BaseException) -> SetupError:
    """Print the cache by operator, and what other settings are predicted to need; return the error to raise."""
    print("\nwhat a step of one process saves for backward, predicted from shapes in float32:\n")
    _estimate(cfg)[1].show()
    print("\npredicted peak of a step, MiB")
    for settings in ({}, *_others(cfg)):
        text = " ".join(f"{key} {value}" for key, value in settings.items()) or "as it is"
        print(f"  {text:60}{_peak(_changed(cfg, settings)) / MIB:10.1f}")
    first = " ".join(str(error).split(". ")[0].split())
    return SetupError(f"{first}: the settings above need less; DROPIT.BUDGET_MB sets how many MiB are saved")


def _others(cfg: CfgNode) -> list[dict[str, Any]]:
    """Settings that need less memory, by key."""
    quantized: list[dict[str, Any]] = [
        {"MODEL.DROPIT": True, "DROPIT.GAMMA": 0.0, "DROPIT.COMPRESS": compress, "DROPIT.BUDGET_MB": 0.0}
        for compress in _QUANTIZED
    ]
    halves = [{"SOLVER.ACCUMULATE": 2 * cfg.SOLVER.ACCUMULATE}] if batch_size(cfg) % 2 == 0 else []
    return [*quantized, *halves]


def _changed(cfg: CfgNode, settings: dict[str, Any]) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list([part for setting in settings.items() for part in setting])
    return changed


def _peak(cfg: CfgNode) -> int:
    model, cache = _estimate(cfg)
    return sum(step_memory(model, _shape(cfg), cache.total_bytes, optimizer_slots(cfg)).values())


def _estimate(cfg: CfgNode) -> tuple[nn.Module, CacheMeter]:
    converts = cfg.MODEL.DROPIT and not cfg.DROPIT.BUDGET_MB
    model = build_on_meta(lambda: convert_layers(build_network(cfg), cfg) if converts else build_network(cfg))
    return model, estimate_cache(model, _shape(cfg))


def _shape(cfg: CfgNode) -> tuple[int, ...]:
    return batch_size(cfg), 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE
