"""From the config to the parts of a run. The config ends here: every part takes plain arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from yacs.config import CfgNode

from dropit import estimate_cache, to_dropit
from dropit.training.callbacks.monitors import CacheMonitor
from dropit.training.checkpoint.writer import CheckpointWriter
from dropit.training.config.keys import flatten
from dropit.training.data.batches import BatchMix
from dropit.training.data.datasets import Source, check_classes, open_dataset
from dropit.training.data.loading import ImageData
from dropit.training.data.samples import Samples
from dropit.training.data.transforms import eval_transform, train_transform
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.architectures import build_model
from dropit.training.model.classifier import Batch, Classifier
from dropit.training.model.freezing import freeze
from dropit.training.model.pretrained import load_pretrained
from dropit.training.model.sharding import ShardedClassifier
from dropit.training.run.info import state_sizes
from dropit.training.solver.optimizer import Recipe


def build_classifier(cfg: CfgNode, *, pretrained: bool = True, sample: Batch | None = None) -> Classifier:
    """The model, its DropIT layers, and what trains it; MODEL.PRETRAINED only if asked to.

    ``sample``: the batch that DROPIT.BUDGET_MB is for; without one the model is a plain one, as evaluation needs.
    """
    seed_everything(cfg.SEED, workers=True, verbose=False)
    model = build_network(cfg, dropit=cfg.MODEL.DROPIT and sample is not None, pretrained=pretrained, sample=sample)
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


def build_network(cfg: CfgNode, *, dropit: bool, pretrained: bool = False, sample: Batch | None = None) -> nn.Module:
    """The model alone, with or without its DropIT layers; a budget is for ``sample`` and is not kept without one."""
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
        _say(f"pretrained   {load_pretrained(model, cfg.MODEL.PRETRAINED, cfg.MODEL.ARCH)}")
    if cfg.MODEL.SYNC_BN:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if cfg.MODEL.FREEZE:
        freeze(model, cfg.MODEL.FREEZE)
    if dropit:
        convert(model, cfg, sample)
    return model


_say = rank_zero_only(print)


def _rate(given: float) -> float | None:
    return None if given == -1 else given


def convert(model: nn.Module, cfg: CfgNode, sample: Batch | None = None) -> None:
    """Swap the layers that DROPIT names."""
    budget = _budget(model, cfg, sample) if cfg.DROPIT.BUDGET_MB and sample is not None else {}
    block_size = cfg.DROPIT.D if cfg.DROPIT.D and cfg.DROPIT.STRATEGY == "fastmink" else None
    skipped = cfg.DROPIT.SKIP

    def wanted(module: nn.Module, fqn: str) -> bool:
        return not any(fnmatch(fqn, pattern) for pattern in skipped)

    try:
        with autocast(cfg) if budget else nullcontext():
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


def autocast(cfg: CfgNode) -> torch.autocast:
    """What TRAIN.PRECISION computes in, for what Lightning does not run."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.TRAIN.PRECISION)
    return torch.autocast("cuda" if pick_accelerator(cfg) == "gpu" else "cpu", dtype, enabled=dtype is not None)


def _budget(model: nn.Module, cfg: CfgNode, sample: Batch) -> dict[str, Any]:
    """What to_dropit takes of a budget; it is measured where the model will train."""
    gpu = pick_accelerator(cfg) == "gpu"
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))
    device = torch.device("cuda", int(local)) if gpu else torch.device("cpu")
    images, labels = (tensor.to(device) for tensor in sample)
    model.to(device).train()
    # In fp16 small gradients would be none. Only the errors' ratios matter.
    scale = 2.0**12 if cfg.TRAIN.PRECISION == "fp16" else 1.0
    return {
        "budget": int(cfg.DROPIT.BUDGET_MB * 2**20),
        "example_input": images,
        "loss_fn": lambda logits: scale * cross_entropy(logits, labels),
        "gamma_min": cfg.DROPIT.GAMMA_MIN,
        "gamma_max": cfg.DROPIT.GAMMA_MAX,
        "on_step": _budget_progress(),
    }


def _budget_progress() -> Callable[[int, int], None]:
    """A bar on a terminal, and then a line, in the first process."""
    bar = tqdm(desc="budget", unit="step", leave=False, disable=True if rank_zero_only.rank else None)  # type: ignore[attr-defined]

    def show(step: int, steps: int) -> None:
        bar.total = steps
        bar.update()
        if step == steps:
            bar.close()
            _say(f"budget       measured in {steps} steps on one batch")

    return show


def build_recipe(cfg: CfgNode) -> Recipe:
    """The solver's keys."""
    solver = cfg.SOLVER
    return Recipe(
        lr=solver.LR,
        max_epochs=solver.MAX_EPOCHS,
        optimizer=solver.OPTIMIZER,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
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


def build_data(cfg: CfgNode) -> ImageData:
    """Both data sets, opened and checked, in batches of one process's share."""
    size, mean, std = cfg.INPUT.SIZE, cfg.INPUT.MEAN, cfg.INPUT.STD
    augment = train_transform(
        size,
        mean,
        std,
        crop=cfg.TRAIN.CROP,
        crop_scale=cfg.TRAIN.CROP_SCALE,
        flip=cfg.TRAIN.FLIP,
        auto_augment=cfg.TRAIN.AUTO_AUGMENT,
        magnitude=cfg.TRAIN.MAGNITUDE,
        erasing=cfg.TRAIN.ERASING,
    )
    train, val = _open(cfg, cfg.TRAIN.PATH, train=True), _open(cfg, cfg.VAL.PATH, train=False)
    check_classes(train, val, cfg.MODEL.NUM_CLASSES)
    mixes = cfg.TRAIN.MIXUP or cfg.TRAIN.CUTMIX
    mix = BatchMix(cfg.MODEL.NUM_CLASSES, mixup=cfg.TRAIN.MIXUP, cutmix=cfg.TRAIN.CUTMIX) if mixes else None
    options = {"seed": cfg.SEED, "cache": cfg.DATALOADER.CACHE, "on_device": cfg.DATALOADER.ON_DEVICE}
    return ImageData(
        Samples(train, augment, mix=mix, **options),
        Samples(val, eval_transform(size, mean, std, resize=cfg.VAL.RESIZE), **options),
        batch_size=batch_size(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        prefetch=cfg.DATALOADER.PREFETCH,
        repeats=cfg.TRAIN.REPEATS,
    )


def _open(cfg: CfgNode, path: str, *, train: bool) -> Source:
    return open_dataset(
        cfg.DATASET,
        path,
        train=train,
        size=cfg.INPUT.SIZE,
        num_classes=cfg.MODEL.NUM_CLASSES,
        unreadable=cfg.DATALOADER.UNREADABLE,
    )


def processes(cfg: CfgNode) -> int:
    """Training processes on all nodes."""
    return cfg.NUM_NODES * cfg.NUM_GPUS  # type: ignore[no-any-return]


def batch_size(cfg: CfgNode) -> int:
    """Samples that one process takes at a time."""
    return cfg.SOLVER.BATCH_SIZE // (processes(cfg) * cfg.SOLVER.ACCUMULATE)  # type: ignore[no-any-return]


def is_sharded(cfg: CfgNode) -> bool:
    """Whether the processes share the weights out."""
    return cfg.PARALLEL == "fsdp" and processes(cfg) > 1  # type: ignore[no-any-return]


def moments(cfg: CfgNode) -> int:
    """Tensors that the optimizer keeps for each parameter."""
    return 2 if cfg.SOLVER.OPTIMIZER == "adamw" else int(cfg.SOLVER.MOMENTUM > 0)


def state_bytes(model: nn.Module, cfg: CfgNode) -> int:
    """Of a checkpoint: weights, their average, buffers and the optimizer's state."""
    weights, gradients = state_sizes(model)
    return (2 if cfg.SOLVER.EMA else 1) * weights + moments(cfg) * gradients


def build_cache_monitor(cfg: CfgNode) -> CacheMonitor:
    """It measures; where the weights are shared out, what the plain model would hold is estimated."""
    if not is_sharded(cfg):
        return CacheMonitor()
    return CacheMonitor(lambda shape: estimate_cache(lambda: build_network(cfg, dropit=False), shape).total_bytes)


def build_averaging(cfg: CfgNode) -> list[Callback]:
    """The moving average of the weights, if there is to be one."""
    return [EMAWeightAveraging(decay=cfg.SOLVER.EMA)] if cfg.SOLVER.EMA else []


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
        callbacks=[*callbacks, LearningRateMonitor("step")] if logger else None,
        enable_checkpointing=bool(logger),
        log_every_n_steps=log_every,
        use_distributed_sampler=False,  # the data has one that leaves nothing out and repeats nothing
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        deterministic="warn",
    )


_PRECISIONS = {"32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def _strategy(cfg: CfgNode) -> Any:
    if processes(cfg) == 1:
        return "auto"
    if is_sharded(cfg):
        return ModelParallelStrategy(processes(cfg), 1, save_distributed_checkpoint=False)
    return "ddp"


def _plugins() -> list[Any]:
    """Under SLURM the batch script queues a job again, and Lightning does not, which would leave files of its own."""
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [CheckpointWriter(), *([SLURMEnvironment(auto_requeue=False)] if slurm else [])]


def check_machine(cfg: CfgNode) -> None:
    """Refuse at once what this machine, or what started this process, cannot do. Raises SetupError."""
    on_cpu, values = pick_accelerator(cfg) == "cpu", flatten(cfg)
    for key, of_gpus in _FOR_GPUS.items():
        if on_cpu and values[key] in of_gpus:
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


def started_processes() -> int | None:
    """How many processes torchrun or srun started together with this one; None where neither did."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment().world_size()
    return int(os.environ["SLURM_NTASKS"]) if SLURMEnvironment.detect() and "SLURM_NTASKS" in os.environ else None


# What a CPU cannot do, or what Lightning would turn into something else there.
_FOR_GPUS: dict[str, tuple[Any, ...]] = {"TRAIN.PRECISION": ("tf32", "fp16"), "MODEL.SYNC_BN": (True,)}


def pick_accelerator(cfg: CfgNode) -> str:
    """gpu or cpu; raises SetupError where there are not enough GPUs."""
    gpus = torch.cuda.device_count()
    chosen: str = cfg.ACCELERATOR
    if chosen == "auto":
        chosen = "gpu" if gpus or cfg.NUM_GPUS > 1 else "cpu"
    if chosen == "gpu" and gpus < cfg.NUM_GPUS:
        raise SetupError(f"NUM_GPUS {cfg.NUM_GPUS}, but this machine has {gpus}; ACCELERATOR cpu runs on the CPU")
    return chosen
