"""Build Lightning's Trainer, and the callbacks of a training run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from yacs.config import CfgNode

from dropit import estimate_cache
from dropit.training.builders.machine import is_sharded, pick_accelerator, processes
from dropit.training.builders.model import build_network
from dropit.training.callbacks.finite_loss import FiniteLoss
from dropit.training.callbacks.monitors import CacheMonitor, Dashboard, EpochLines, SpeedMonitor
from dropit.training.callbacks.probe import GradientProbe
from dropit.training.callbacks.saving import Saving
from dropit.training.callbacks.settings import SolverSettings
from dropit.training.checkpoint.keepers import ConfigKeeper, RandomKeeper
from dropit.training.checkpoint.writer import CheckpointWriter

_PRECISIONS = {"32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def build_trainer(
    cfg: CfgNode,
    directory: Path | None = None,
    callbacks: Sequence[Callback] = (),
    version: str | None = None,
    log_every: int = 10,
    purge_from: int | None = None,
) -> Trainer:
    """Return a Trainer on the devices that the config asks for. It logs to directory/version_N, if to any.

    ``purge_from``: the step from which on TensorBoard is to forget what was logged there before.
    """
    logger = directory is not None and TensorBoardLogger(
        directory.parent, name=directory.name, version=version, default_hp_metric=False, purge_step=purge_from
    )
    return Trainer(
        accelerator=pick_accelerator(cfg),
        devices=cfg.NUM_GPUS,
        num_nodes=cfg.NUM_NODES,
        strategy=_strategy(cfg),
        plugins=_plugins(),
        precision=_PRECISIONS[cfg.TRAIN.PRECISION],  # type: ignore[arg-type]
        max_epochs=cfg.SOLVER.MAX_EPOCHS,
        fast_dev_run=cfg.TRY_STEPS,
        accumulate_grad_batches=cfg.SOLVER.ACCUMULATE,
        gradient_clip_val=cfg.SOLVER.CLIP_NORM or None,
        check_val_every_n_epoch=cfg.CHECK_VAL_EVERY_N_EPOCH,
        logger=logger,
        callbacks=[*callbacks, *([LearningRateMonitor("step")] if logger else [])],
        enable_checkpointing=bool(logger),
        log_every_n_steps=log_every,
        use_distributed_sampler=False,  # SharedBatches leaves nothing out and repeats nothing
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        deterministic="warn",
    )


def _strategy(cfg: CfgNode) -> Any:
    if processes(cfg) == 1:
        return "auto"
    if is_sharded(cfg):
        return ModelParallelStrategy(processes(cfg), 1, save_distributed_checkpoint=False)
    return "ddp"


def _plugins() -> list[Any]:
    # Under SLURM the batch script queues a job again; Lightning would write other files to do so.
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [CheckpointWriter(), *([SLURMEnvironment(auto_requeue=False)] if slurm else [])]


@dataclass(frozen=True)
class TrainingCallbacks:
    """The callbacks of a training run: those that are read at its end, and all in the order of their calls."""

    cache: CacheMonitor
    speed: SpeedMonitor
    best: ModelCheckpoint
    saving: Saving
    all: list[Callback]


def build_callbacks(cfg: CfgNode, *, new_settings: bool = False) -> TrainingCallbacks:
    """Return the callbacks of a training run; ``new_settings``: resumed, with other settings of the optimizer."""
    cache, speed = _cache_monitor(cfg), SpeedMonitor()
    best = ModelCheckpoint(filename="best", monitor="val/acc1", mode="max", enable_version_counter=False)
    # After every epoch; save_last would follow the best only.
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    # A probe's steps are not to be measured.
    probes = [GradientProbe(cfg.DROPIT.PROBE_EVERY)] if cfg.MODEL.DROPIT and cfg.DROPIT.PROBE_EVERY else []
    random = RandomKeeper()
    saving = Saving(
        None if cfg.TRY_STEPS else last,
        random,
        every_steps=cfg.CHECKPOINT.EVERY_N_STEPS,
        every_minutes=cfg.CHECKPOINT.EVERY_MINUTES,
    )
    keepers = [best, last, ConfigKeeper(cfg.dump()), random, saving]
    lines = [] if sys.stdout.isatty() else [EpochLines()]
    # Averages come before checkpoints, which keep them.
    order = [
        *probes,
        cache,
        speed,
        *build_averaging(cfg),
        SolverSettings(changed=new_settings),
        Dashboard(_hparams(cfg)),
        *keepers,
        *lines,
    ]
    return TrainingCallbacks(cache, speed, best, saving, [FiniteLoss(last), *order])


def _cache_monitor(cfg: CfgNode) -> CacheMonitor:
    """Return what measures the cache; for sharded weights, the plain model's is estimated."""
    if not is_sharded(cfg):
        return CacheMonitor()
    return CacheMonitor(lambda shape: estimate_cache(lambda: build_network(cfg), shape).total_bytes)


def build_averaging(cfg: CfgNode) -> list[Callback]:
    """Return the callback that averages the weights, if SOLVER.EMA is set."""
    return [EMAWeightAveraging(decay=cfg.SOLVER.EMA)] if cfg.SOLVER.EMA else []


def _hparams(cfg: CfgNode) -> dict[str, Any]:
    """Return five: TensorBoard's table shows no more by default."""
    dropping = cfg.MODEL.DROPIT
    return {
        "dataset": cfg.DATASET,
        "arch": cfg.MODEL.ARCH,
        "strategy": cfg.DROPIT.STRATEGY if dropping else "plain",
        "gamma": cfg.DROPIT.GAMMA if dropping else 0.0,
        "lr": cfg.SOLVER.LR,
    }
