"""What a run asks of the machine: processes, devices and precision."""

from __future__ import annotations

import os
from typing import Any

import torch
from yacs.config import CfgNode

from dropit.training.config.keys import flatten
from dropit.training.errors import SetupError
from dropit.training.processes import started_processes

# What a CPU cannot do, or what Lightning would replace there.
_FOR_GPUS: dict[str, tuple[Any, ...]] = {"TRAIN.PRECISION": ("tf32", "fp16"), "MODEL.SYNC_BN": (True,)}


def check_machine(cfg: CfgNode) -> None:
    """Raise SetupError for what this machine, or what started this process, cannot do."""
    on_cpu, values = pick_accelerator(cfg) == "cpu", flatten(cfg)
    for key, for_gpus in _FOR_GPUS.items():
        if on_cpu and values[key] in for_gpus:
            raise SetupError(f"{key} {values[key]} needs a GPU, and this run is on the CPU")
    started = started_processes()
    if started is None and cfg.NUM_NODES > 1:
        raise SetupError(
            f"NUM_NODES {cfg.NUM_NODES}: start train.py on each node, with torchrun --nnodes {cfg.NUM_NODES} or with "
            "srun"
        )
    if started is not None and started != processes(cfg):
        raise SetupError(
            f"NUM_NODES {cfg.NUM_NODES} with NUM_GPUS {cfg.NUM_GPUS} is {processes(cfg)} processes, but torchrun or "
            f"srun started {started}"
        )


def pick_accelerator(cfg: CfgNode) -> str:
    """Return gpu or cpu; raises SetupError where there are not enough GPUs."""
    gpus = torch.cuda.device_count()
    chosen: str = cfg.ACCELERATOR
    if chosen == "auto":
        chosen = "gpu" if gpus or cfg.NUM_GPUS > 1 else "cpu"
    if chosen == "gpu" and gpus < cfg.NUM_GPUS:
        raise SetupError(f"NUM_GPUS {cfg.NUM_GPUS}, but this machine has {gpus}; ACCELERATOR cpu runs on the CPU")
    return chosen


def pick_device(cfg: CfgNode) -> torch.device:
    """Return the device of this process, before Lightning has assigned it."""
    if pick_accelerator(cfg) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def autocast(cfg: CfgNode) -> torch.autocast:
    """Return a context in TRAIN.PRECISION, for what Lightning does not run."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.TRAIN.PRECISION)
    return torch.autocast("cuda" if pick_accelerator(cfg) == "gpu" else "cpu", dtype, enabled=dtype is not None)


def processes(cfg: CfgNode) -> int:
    """Return the number of training processes on all nodes."""
    return cfg.NUM_NODES * cfg.NUM_GPUS  # type: ignore[no-any-return]


def batch_size(cfg: CfgNode) -> int:
    """Return the samples that one process takes at a time."""
    return cfg.SOLVER.BATCH_SIZE // (processes(cfg) * cfg.SOLVER.ACCUMULATE)  # type: ignore[no-any-return]


def is_sharded(cfg: CfgNode) -> bool:
    """Return whether each process keeps only a part of the weights."""
    return cfg.PARALLEL == "fsdp" and processes(cfg) > 1  # type: ignore[no-any-return]
