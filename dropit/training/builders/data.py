"""Build the data that a config describes."""

from __future__ import annotations

from yacs.config import CfgNode

from dropit.training.builders.machine import batch_size
from dropit.training.data.batches import BatchMix
from dropit.training.data.datasets import Source, check_classes, open_dataset
from dropit.training.data.loading import ImageData
from dropit.training.data.samples import Samples
from dropit.training.data.transforms import ImageTransform, eval_transform, train_transform
from dropit.training.errors import warn


def build_data(cfg: CfgNode) -> ImageData:
    """Return both data sets, opened and checked, in batches of one process's share."""
    train, val = _open(cfg, cfg.TRAIN.PATH, train=True), _open(cfg, cfg.VAL.PATH, train=False)
    check_classes(train, val, cfg.MODEL.NUM_CLASSES)
    for line in _doubtful(cfg, train):
        warn(line)
    evaluate = eval_transform(cfg.INPUT.SIZE, cfg.INPUT.MEAN, cfg.INPUT.STD, resize=cfg.VAL.RESIZE)
    options = {"seed": cfg.SEED, "cache": cfg.DATALOADER.CACHE, "on_device": cfg.DATALOADER.ON_DEVICE}
    return ImageData(
        Samples(train, _augmentation(cfg), mix=_mix(cfg), **options),
        Samples(val, evaluate, **options),
        batch_size=batch_size(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        timeout=60 * cfg.DATALOADER.TIMEOUT,
        repeats=cfg.TRAIN.REPEATS,
    )


def _doubtful(cfg: CfgNode, train: Source) -> list[str]:
    """Return a line for each setting that the data allow, but that is hardly meant."""
    classes, lines = len(train.classes), []
    if classes < cfg.MODEL.NUM_CLASSES:
        lines.append(f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but the data has {classes} classes")
    if len(train) < cfg.SOLVER.BATCH_SIZE:
        lines.append(f"SOLVER.BATCH_SIZE is {cfg.SOLVER.BATCH_SIZE}, but there are {len(train)} training images")
    return lines


def _open(cfg: CfgNode, path: str, *, train: bool) -> Source:
    return open_dataset(
        cfg.DATASET,
        path,
        train=train,
        size=cfg.INPUT.SIZE,
        num_classes=cfg.MODEL.NUM_CLASSES,
        unreadable=cfg.DATALOADER.UNREADABLE,
    )


def _augmentation(cfg: CfgNode) -> ImageTransform:
    return train_transform(
        cfg.INPUT.SIZE,
        cfg.INPUT.MEAN,
        cfg.INPUT.STD,
        crop=cfg.TRAIN.CROP,
        crop_scale=cfg.TRAIN.CROP_SCALE,
        flip=cfg.TRAIN.FLIP,
        auto_augment=cfg.TRAIN.AUTO_AUGMENT,
        magnitude=cfg.TRAIN.MAGNITUDE,
        erasing=cfg.TRAIN.ERASING,
    )


def _mix(cfg: CfgNode) -> BatchMix | None:
    if not cfg.TRAIN.MIXUP and not cfg.TRAIN.CUTMIX:
        return None
    return BatchMix(cfg.MODEL.NUM_CLASSES, mixup=cfg.TRAIN.MIXUP, cutmix=cfg.TRAIN.CUTMIX)
