"""Build the model that a config describes, and what trains it."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import seed_everything
from torch import nn
from yacs.config import CfgNode

from dropit.training.builders.conversion import convert_layers, fit_budget
from dropit.training.builders.machine import is_sharded
from dropit.training.model.architectures import build_model
from dropit.training.model.classifier import Batch, Classifier
from dropit.training.model.freezing import freeze
from dropit.training.model.pretrained import load_pretrained
from dropit.training.model.sharding import ShardedClassifier
from dropit.training.model.sizes import state_sizes
from dropit.training.solver.recipe import Recipe


def build_module(cfg: CfgNode, *, convert: bool, pretrained: bool = False, sample: Batch | None = None) -> Classifier:
    """Return the LightningModule: the model, converted or plain, and what trains it.

    ``pretrained``: start from MODEL.PRETRAINED, if it is set. ``sample``: the batch that DROPIT.BUDGET_MB is for;
    raises ValueError where a budget has none.
    """
    if convert and cfg.DROPIT.BUDGET_MB and sample is None:
        raise ValueError("DROPIT.BUDGET_MB needs a sample: the batch that it is for")
    seed_everything(cfg.SEED, workers=True, verbose=False)
    model = build_network(cfg, pretrained=pretrained)
    if convert and cfg.DROPIT.BUDGET_MB and sample is not None:
        fit_budget(model, cfg, sample)
    elif convert:
        convert_layers(model, cfg)
    if cfg.TRAIN.COMPILE:
        model.compile()
    kind = ShardedClassifier if is_sharded(cfg) else Classifier
    return kind(
        model,
        cfg.MODEL.NUM_CLASSES,
        build_recipe(cfg),
        label_smoothing=cfg.SOLVER.LABEL_SMOOTHING,
        channels_last=cfg.TRAIN.CHANNELS_LAST,
    )


def build_network(cfg: CfgNode, *, pretrained: bool = False) -> nn.Module:
    """Return the plain model; with the weights of MODEL.PRETRAINED, if ``pretrained``."""
    model = build_model(
        cfg.MODEL.ARCH,
        cfg.MODEL.NUM_CLASSES,
        cfg.INPUT.SIZE,
        stem=cfg.MODEL.STEM,
        dropout=_rate(cfg.MODEL.DROPOUT),
        attention_dropout=_rate(cfg.MODEL.ATTENTION_DROPOUT),
        drop_path=_rate(cfg.MODEL.DROP_PATH),
    )
    if pretrained and cfg.MODEL.PRETRAINED:
        report = load_pretrained(model, cfg.MODEL.PRETRAINED, cfg.MODEL.ARCH)
        rank_zero_only(print)(f"pretrained   {report}")
    if cfg.MODEL.SYNC_BN:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if cfg.MODEL.FREEZE:
        freeze(model, cfg.MODEL.FREEZE)
    return model


def _rate(given: float) -> float | None:
    return None if given == -1 else given


def build_recipe(cfg: CfgNode) -> Recipe:
    """Return the optimizer and its schedule as plain values."""
    solver = cfg.SOLVER
    return Recipe(
        lr=solver.LR,
        max_epochs=solver.MAX_EPOCHS,
        optimizer=solver.OPTIMIZER,
        momentum=solver.MOMENTUM,
        betas=tuple(solver.BETAS),
        weight_decay=solver.WEIGHT_DECAY,
        no_decay=tuple(solver.NO_DECAY),
        layer_decay=solver.LAYER_DECAY,
        schedule=solver.SCHEDULE,
        milestones=tuple(solver.MILESTONES),
        gamma=solver.GAMMA,
        min_lr=solver.MIN_LR,
        warmup_epochs=solver.WARMUP_EPOCHS,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def optimizer_slots(cfg: CfgNode) -> int:
    """Return how many tensors the optimizer keeps for each parameter."""
    return 2 if cfg.SOLVER.OPTIMIZER == "adamw" else int(cfg.SOLVER.MOMENTUM > 0)


def checkpoint_bytes(model: nn.Module, cfg: CfgNode) -> int:
    """Return the bytes of a checkpoint: weights, their average, buffers and the optimizer's slots."""
    weights, gradients = state_sizes(model)
    return (2 if cfg.SOLVER.EMA else 1) * weights + optimizer_slots(cfg) * gradients
