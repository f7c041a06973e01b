"""From the config to the parts of a run. The config ends here: every part takes plain arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy
from yacs.config import CfgNode

from dropit import to_dropit
from dropit.training.data import ImageData, check_classes, eval_transform, open_dataset, train_transform
from dropit.training.errors import ConfigError, SetupError
from dropit.training.models import build_model
from dropit.training.module import Batch, Classifier
from dropit.training.optim import Recipe


def build_classifier(cfg: CfgNode, *, pretrained: bool = True, sample: Batch | None = None) -> Classifier:
    """The model, its DropIT layers, and what trains it; MODEL.PRETRAINED only if asked to.

    ``sample``: the batch that DROPIT.BUDGET_MB is for; without one the model is a plain one, as evaluation needs.
    """
    seed_everything(cfg.SEED, workers=True, verbose=False)
    model = build_network(cfg, dropit=cfg.MODEL.DROPIT and sample is not None, pretrained=pretrained, sample=sample)
    return Classifier(model, cfg.MODEL.NUM_CLASSES, build_recipe(cfg))


def build_network(cfg: CfgNode, *, dropit: bool, pretrained: bool = False, sample: Batch | None = None) -> nn.Module:
    """The model alone, with or without its DropIT layers; a budget is for ``sample`` and is not kept without one."""
    model = build_model(
        cfg.MODEL.ARCH,
        cfg.MODEL.NUM_CLASSES,
        cfg.INPUT.SIZE,
        stem=cfg.MODEL.STEM,
        pretrained=cfg.MODEL.PRETRAINED if pretrained else "",
    )
    if dropit:
        convert(model, cfg, sample)
    return model


def convert(model: nn.Module, cfg: CfgNode, sample: Batch | None = None) -> None:
    """Swap the layers that DROPIT names."""
    budget = _budget(model, cfg, sample) if cfg.DROPIT.BUDGET_MB and sample is not None else {}
    block_size = cfg.DROPIT.D if cfg.DROPIT.D and cfg.DROPIT.STRATEGY == "fastmink" else None
    skipped = cfg.DROPIT.SKIP

    def wanted(module: nn.Module, fqn: str) -> bool:
        return not any(fnmatch(fqn, pattern) for pattern in skipped)

    try:
        to_dropit(
            model,
            cfg.DROPIT.STRATEGY,
            cfg.DROPIT.GAMMA,
            compress=cfg.DROPIT.COMPRESS,
            value_dtype=cfg.DROPIT.VALUE_DTYPE or None,
            filter_fn=wanted,
            block_size=block_size,
            **budget,
        )
    except ValueError as error:
        keys = "DROPIT.BUDGET_MB" if budget else f"MODEL.DROPIT with DROPIT.SKIP {skipped}"
        raise ConfigError(f"{keys}: {error}") from error


def _budget(model: nn.Module, cfg: CfgNode, sample: Batch) -> dict[str, Any]:
    """What to_dropit takes of a budget; it is measured where the model will train."""
    gpu = pick_accelerator(cfg) == "gpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    images, labels = (tensor.to(device) for tensor in sample)
    model.to(device).train()
    return {
        "budget": int(cfg.DROPIT.BUDGET_MB * 2**20),
        "example_input": images,
        "loss_fn": lambda logits: cross_entropy(logits, labels),
        "gamma_min": cfg.DROPIT.GAMMA_MIN,
        "gamma_max": cfg.DROPIT.GAMMA_MAX,
    }


def build_recipe(cfg: CfgNode) -> Recipe:
    """The solver's keys."""
    solver = cfg.SOLVER
    return Recipe(
        lr=solver.LR,
        max_epochs=solver.MAX_EPOCHS,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        schedule=solver.SCHEDULE,
        milestones=tuple(solver.MILESTONES),
        gamma=solver.GAMMA,
        warmup_epochs=solver.WARMUP_EPOCHS,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def build_data(cfg: CfgNode) -> ImageData:
    """Both data sets, opened and checked, in batches of one process's share."""
    size, mean, std = cfg.INPUT.SIZE, cfg.INPUT.MEAN, cfg.INPUT.STD
    augment = train_transform(
        size, mean, std, crop=cfg.TRAIN.CROP, crop_scale=cfg.TRAIN.CROP_SCALE, flip=cfg.TRAIN.FLIP
    )
    train = open_dataset(cfg.DATASET, cfg.TRAIN.PATH, train=True, transform=augment)
    plain = eval_transform(size, mean, std, resize=cfg.VAL.RESIZE)
    val = open_dataset(cfg.DATASET, cfg.VAL.PATH, train=False, transform=plain)
    check_classes(train, val, cfg.MODEL.NUM_CLASSES)
    batch_size = cfg.SOLVER.BATCH_SIZE // cfg.NUM_GPUS
    return ImageData(train, val, batch_size=batch_size, num_workers=cfg.DATALOADER.NUM_WORKERS)


def build_checkpointing() -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """best.ckpt by val/acc1, and last.ckpt after every epoch (save_last would follow the best only)."""
    best = ModelCheckpoint(filename="best", monitor="val/acc1", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    return best, last


def build_trainer(
    cfg: CfgNode,
    directory: Path | None = None,
    callbacks: Sequence[Callback] = (),
    version: str | None = None,
    log_every: int = 10,
) -> Trainer:
    """Lightning's Trainer on the devices that the config asks for. It logs to directory/version_N, if to any."""
    logger = directory is not None and TensorBoardLogger(
        directory.parent, name=directory.name, version=version, default_hp_metric=False
    )
    return Trainer(
        accelerator=pick_accelerator(cfg),
        devices=cfg.NUM_GPUS,
        strategy="ddp" if cfg.NUM_GPUS > 1 else "auto",
        max_epochs=cfg.SOLVER.MAX_EPOCHS,
        check_val_every_n_epoch=cfg.CHECK_VAL_EVERY_N_EPOCH,
        logger=logger,
        callbacks=[*callbacks, LearningRateMonitor("step")] if logger else None,
        enable_checkpointing=bool(logger),
        log_every_n_steps=log_every,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        deterministic="warn",
    )


def pick_accelerator(cfg: CfgNode) -> str:
    """gpu or cpu; raises SetupError where there are not enough GPUs."""
    gpus = torch.cuda.device_count()
    chosen: str = cfg.ACCELERATOR
    if chosen == "auto":
        chosen = "gpu" if gpus or cfg.NUM_GPUS > 1 else "cpu"
    if chosen == "gpu" and gpus < cfg.NUM_GPUS:
        raise SetupError(f"NUM_GPUS {cfg.NUM_GPUS}, but this machine has {gpus}; ACCELERATOR cpu runs on the CPU")
    return chosen
