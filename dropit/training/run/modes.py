"""The modes of train.py, from a config file to the closing summary."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from yacs.config import CfgNode

from dropit import coverage
from dropit.training.builders.model import (
    autocast,
    batch_size,
    build_averaging,
    build_cache_monitor,
    build_checkpointing,
    build_classifier,
    build_data,
    build_network,
    build_trainer,
    check_machine,
    moments,
    pick_accelerator,
    processes,
    state_bytes,
)
from dropit.training.callbacks.monitors import CacheMonitor, Dashboard, EpochLines, SpeedMonitor
from dropit.training.callbacks.probe import GradientProbe
from dropit.training.callbacks.stopping import FiniteLoss, Interruption, Interruptions, end_others
from dropit.training.checkpoint import saved
from dropit.training.checkpoint.keepers import ConfigKeeper, RandomKeeper
from dropit.training.checkpoint.writer import check_space
from dropit.training.config.check import ineffective
from dropit.training.config.load import load
from dropit.training.data.loading import ImageData
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.classifier import Classifier
from dropit.training.run.info import describe
from dropit.training.run.timing import as_table, time_loading, time_steps

_TIMED_STEPS = 20
# Beside the model, what the optimizer's state in a checkpoint is of.
_OPTIMIZERS_STATE = ("SOLVER.OPTIMIZER", "SOLVER.NO_DECAY", "SOLVER.LAYER_DECAY")
_KNOWN_WARNINGS = (
    ".*LeafSpec.*",  # Lightning 2.6 on torch >= 2.11
    ".*functional.all_gather is deprecated.*",  # by Lightning 2.6, on torch >= 2.14
    ".*does not have many workers.*",
    ".*will create .* worker processes.*",
    ".*Checkpoint directory .* exists.*",  # on --resume
)


def train(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Train, evaluate as often as the config says, and print what came out."""
    cfg = _start(cfg_path, overrides)
    if cfg.CKPT and not resume:
        raise ConfigError("CKPT is for --resume or --mode eval; to start from weights use MODEL.PRETRAINED")
    directory = run_dir(cfg_path, cfg.OUTPUT_DIR)
    checkpoint = _find_last(cfg, directory) if resume else None
    data = build_data(cfg)
    # What a budget is spent on is measured with the weights that the run began with.
    pretrained = not resume or cfg.DROPIT.BUDGET_MB > 0
    classifier = build_classifier(cfg, pretrained=pretrained, sample=data.sample())
    _make(directory)

    cache, speed, (best, last) = build_cache_monitor(cfg), SpeedMonitor(), build_checkpointing()
    callbacks = _callbacks(cfg, [cache, speed], best, last)
    # A run that is taken up again goes on in its own logs; one from elsewhere gets new ones.
    known = checkpoint is not None and directory.resolve() in checkpoint.resolve().parents
    version = saved.version_dir(checkpoint).name if checkpoint and known else None
    if not cfg.TRY_STEPS:  # best.ckpt and last.ckpt, if they are not there yet, and one that is being written
        rank_zero_only(check_space)(directory, (1 if version else 3) * state_bytes(classifier.model, cfg))
    steps = data.steps_per_epoch(processes(cfg)) // cfg.SOLVER.ACCUMULATE
    trainer = build_trainer(cfg, directory, callbacks, version, log_every=max(1, min(10, steps)))
    if trainer.is_global_zero and cfg.MODEL.DROPIT:
        report = coverage(classifier.model)
        chosen = f"{cfg.DROPIT.BUDGET_MB:g} MiB" if cfg.DROPIT.BUDGET_MB else f"gamma {cfg.DROPIT.GAMMA}"
        print(f"DropIT: {cfg.DROPIT.STRATEGY}, {chosen}: {report.summary()} layers")
    _fit(trainer, classifier, data, checkpoint)
    if not trainer.is_global_zero:
        return
    if cfg.TRY_STEPS:
        print(f"tried {cfg.TRY_STEPS} steps and an evaluation; nothing was written")
        return
    if not speed.measured:
        print(f"nothing left to train: {checkpoint} is at the end of SOLVER.MAX_EPOCHS {cfg.SOLVER.MAX_EPOCHS}")
        return
    print(_summary(trainer, cache, speed, best.best_model_score))
    if data.skipped:
        print(f"unreadable   {len(data.skipped)} images were left out, the first of them {data.skipped[0]}")


def _callbacks(cfg: CfgNode, monitors: list[Callback], best: ModelCheckpoint, last: ModelCheckpoint) -> list[Callback]:
    """In the order in which Lightning calls them."""
    # The probe's own steps are not to be measured.
    probes = [GradientProbe(cfg.DROPIT.PROBE_EVERY)] if cfg.MODEL.DROPIT and cfg.DROPIT.PROBE_EVERY else []
    averaging = build_averaging(cfg)  # what checkpoints keep
    keepers = [
        best,
        last,
        ConfigKeeper(cfg.dump()),
        RandomKeeper(),
        Interruptions(None if cfg.TRY_STEPS else last),
    ]
    lines = [] if sys.stdout.isatty() else [EpochLines()]
    return [FiniteLoss(last), *probes, *monitors, *averaging, Dashboard(_hparams(cfg)), *keepers, *lines]


def _fit(trainer: Trainer, classifier: Classifier, data: ImageData, checkpoint: Path | None) -> None:
    """Train, from the checkpoint on if there is one; a run that was asked to stop says how to go on."""
    try:
        trainer.fit(classifier, data, ckpt_path=checkpoint, weights_only=True)
    except Interruption as stopped:
        if trainer.is_global_zero:
            after = f"--resume goes on from {stopped.saved}" if stopped.saved else "nothing was written"
            print(f"train.py: stopped by {stopped.name}; {after}", file=sys.stderr)
        raise
    except Exception as error:
        end_others(trainer, error)
        raise


def evaluate(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print loss and accuracies of a checkpoint: CKPT, or the best of this config's newest run."""
    if resume:
        raise ConfigError("--resume is for --mode train; --mode eval reads CKPT or the newest best.ckpt")
    cfg = _start(cfg_path, overrides)
    data = build_data(cfg)
    directory = run_dir(cfg_path, cfg.OUTPUT_DIR)
    path = Path(cfg.CKPT) if cfg.CKPT else saved.newest(directory, "best")
    checkpoint = saved.read(path, like=cfg, sections=("MODEL.ARCH", "MODEL.NUM_CLASSES", "MODEL.STEM"))
    classifier = build_classifier(cfg, pretrained=False)
    classifier.load_state_dict(checkpoint["state_dict"])
    trainer = build_trainer(cfg)
    (metrics,) = trainer.validate(classifier, data, verbose=False)
    if trainer.is_global_zero:
        print(f"checkpoint   {path}")
        print("validation   " + ", ".join(f"{tag.removeprefix('val/')} {metrics[tag]:.4f}" for tag in sorted(metrics)))


def info(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print what a step of one process would compute and hold, without computing or holding it."""
    if resume:
        raise ConfigError("--resume is for --mode train")
    cfg = _load(cfg_path, overrides)
    batch = batch_size(cfg)
    describe(
        f"{cfg.MODEL.ARCH} on {cfg.DATASET}",
        lambda: build_network(cfg, dropit=False),
        (lambda: build_network(cfg, dropit=True)) if cfg.MODEL.DROPIT else None,
        (batch, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE),
        moments=moments(cfg),
        budget=int(cfg.DROPIT.BUDGET_MB * 2**20) if cfg.MODEL.DROPIT else 0,
    )


def time(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print where the time of a step of one process goes, and what the loader alone could do."""
    if resume:
        raise ConfigError("--resume is for --mode train")
    cfg = _start(cfg_path, overrides)
    data = build_data(cfg)
    loader = data.train_dataloader()
    device = torch.device("cuda" if pick_accelerator(cfg) == "gpu" else "cpu")
    steps = cfg.TRY_STEPS or _TIMED_STEPS
    print(f"{cfg.MODEL.ARCH} on {cfg.DATASET}: means of {steps} steps of {batch_size(cfg)} images, on {device}")
    columns = {}
    for name in ("plain", *(["DropIT"] if cfg.MODEL.DROPIT else [])):
        sample = data.sample() if name == "DropIT" else None
        classifier = build_classifier(cfg, pretrained=False, sample=sample).to(device).train()
        columns[name] = time_steps(
            classifier,
            loader,
            data.train.finish,
            classifier.criterion,
            classifier.configure_optimizers()["optimizer"],
            device,
            steps=steps,
            precision=lambda: autocast(cfg),
        )
    print(as_table(columns, batch_size(cfg)))
    alone = time_loading(loader, steps)
    print(f"the loader alone gives {batch_size(cfg) / alone:.0f} images/s, {alone * 1e3:.1f} ms for a batch")


def run_dir(cfg_path: str | Path, output_dir: str | Path) -> Path:
    """configs/a/b.yaml writes to OUTPUT_DIR/a/b, a directory version_N for each run."""
    path = Path(cfg_path).resolve()
    return Path(output_dir) / path.parent.name / path.with_suffix("").name


def _start(cfg_path: str, overrides: Sequence[str]) -> CfgNode:
    """Read the config and refuse at once what this machine cannot run."""
    cfg = _load(cfg_path, overrides)
    check_machine(cfg)
    torch.set_float32_matmul_precision("high" if cfg.TRAIN.PRECISION == "tf32" else "highest")
    return cfg


def _load(cfg_path: str, overrides: Sequence[str]) -> CfgNode:
    """Read the config, and warn of keys that have no effect."""
    _quiet()
    cfg = load(cfg_path, overrides)
    for line in ineffective(cfg):
        _say(f"train.py: warning: {line}", file=sys.stderr)
    return cfg


_say = rank_zero_only(print)


def _quiet() -> None:
    """Leave out what Lightning says of itself and of the machine; its warnings stay, but for the known ones."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It ends this process where another is lost, and says so as information.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _find_last(cfg: CfgNode, directory: Path) -> Path:
    """The checkpoint to go on from: CKPT, or the newest run's last.ckpt, or its best.ckpt where that is damaged."""

    def fits(path: Path) -> Path:
        saved.read(path, like=cfg, sections=("DATASET", "MODEL.", "DROPIT.", *_OPTIMIZERS_STATE))
        return path

    if cfg.CKPT:
        return fits(Path(cfg.CKPT))
    last = saved.newest(directory, "last")
    try:
        return fits(last)
    except SetupError as error:
        best = last.with_name("best.ckpt")
        if not best.is_file():
            raise
        found = fits(best)
        _say(f"train.py: {error}; going on from {best}", file=sys.stderr)
        return found


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"OUTPUT_DIR: cannot write to {directory}: {error.strerror}") from error


def _hparams(cfg: CfgNode) -> dict[str, Any]:
    """Five, as TensorBoard's table shows no more of itself."""
    dropping = cfg.MODEL.DROPIT
    return {
        "dataset": cfg.DATASET,
        "arch": cfg.MODEL.ARCH,
        "strategy": cfg.DROPIT.STRATEGY if dropping else "plain",
        "gamma": cfg.DROPIT.GAMMA if dropping else 0.0,
        "lr": cfg.SOLVER.LR,
    }


def _summary(trainer: Trainer, cache: CacheMonitor, speed: SpeedMonitor, best: Any) -> str:
    metrics = trainer.callback_metrics
    accuracy = "not evaluated"
    if "val/acc1" in metrics:
        accuracy = f"acc1 {metrics['val/acc1']:.4f} (best {best:.4f}), acc5 {metrics['val/acc5']:.4f}"
    change = (cache.cache_ratio - 1) * 100
    return "\n".join(
        [
            f"validation   {accuracy}",
            f"cache        {cache.cache_mb:.2f} MiB held for backward, {cache.dense_mb:.2f} plain ({change:+.1f} %)",
            f"time         {speed.step_seconds * 1000:.1f} ms per step",
            f"logs         {trainer.logger.log_dir}",  # type: ignore[union-attr]
        ]
    )
