"""python train.py --mode train: train, evaluate as the config says, and print what came out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from torch import nn
from yacs.config import CfgNode

from dropit import coverage
from dropit.training.builders.data import build_data
from dropit.training.builders.machine import processes
from dropit.training.builders.model import build_module, checkpoint_bytes
from dropit.training.builders.trainer import TrainingCallbacks, build_callbacks, build_trainer
from dropit.training.callbacks.interruption import Interruption
from dropit.training.checkpoint import saved
from dropit.training.checkpoint.writer import check_space
from dropit.training.config.check import check_same
from dropit.training.data.loading import ImageData
from dropit.training.errors import ConfigError, SetupError
from dropit.training.model.classifier import Classifier
from dropit.training.processes import end_others
from dropit.training.run.start import run_dir, say, start

# Sections and keys that must equal those of a checkpoint: the model's, and what the optimizer's state depends on.
_SAME = ("DATASET", "MODEL.", "DROPIT.", "SOLVER.OPTIMIZER", "SOLVER.NO_DECAY", "SOLVER.LAYER_DECAY")


def train(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Train, evaluate as often as the config says, and print what came out."""
    cfg = start(cfg_path, overrides)
    if cfg.CKPT and not resume:
        raise ConfigError("CKPT is for --resume or --mode eval; to start from weights use MODEL.PRETRAINED")
    directory = run_dir(cfg_path, cfg.OUTPUT_DIR)
    checkpoint = _find_last(cfg, directory) if resume else None
    data = build_data(cfg)
    classifier = _build(cfg, data, resume=resume)
    _make(directory)
    version = _version(directory, checkpoint)
    if not cfg.TRY_STEPS:  # best.ckpt and last.ckpt, if they are not there yet, and one that is being written
        rank_zero_only(check_space)(directory, (1 if version else 3) * checkpoint_bytes(classifier.model, cfg))
    callbacks = build_callbacks(cfg)
    steps = data.steps_per_epoch(processes(cfg)) // cfg.SOLVER.ACCUMULATE
    trainer = build_trainer(cfg, directory, callbacks.all, version, log_every=max(1, min(10, steps)))
    if cfg.MODEL.DROPIT:
        say(_converted(cfg, classifier.model))
    _fit(trainer, classifier, data, checkpoint)
    if trainer.is_global_zero:
        print(_outcome(cfg, trainer, callbacks, checkpoint))
    if trainer.is_global_zero and data.skipped:
        print(f"unreadable   {len(data.skipped)} images were left out, the first of them {data.skipped[0]}")


def _find_last(cfg: CfgNode, directory: Path) -> Path:
    """Return the checkpoint to go on from: CKPT, or the newest run's last.ckpt, or its best.ckpt if that is damaged."""

    def fits(path: Path) -> Path:
        check_same(saved.read(path)["config"], cfg, _SAME, path)
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
        say(f"train.py: {error}; going on from {best}", file=sys.stderr)
        return found


def _build(cfg: CfgNode, data: ImageData, *, resume: bool) -> Classifier:
    """Return the module; a budget is measured with the weights that the run began with, when it is resumed too."""
    sample = data.sample()  # without a budget, too: errors in the images then come before the run has a directory
    pretrained = not resume or cfg.DROPIT.BUDGET_MB > 0
    return build_module(cfg, convert=cfg.MODEL.DROPIT, pretrained=pretrained, sample=sample)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"OUTPUT_DIR: cannot write to {directory}: {error.strerror}") from error


def _version(directory: Path, checkpoint: Path | None) -> str | None:
    """Return the version_N whose logs a resumed run continues; None where it gets new ones."""
    if checkpoint is None or directory.resolve() not in checkpoint.resolve().parents:
        return None
    return saved.version_dir(checkpoint).name


def _converted(cfg: CfgNode, model: nn.Module) -> str:
    chosen = f"{cfg.DROPIT.BUDGET_MB:g} MiB" if cfg.DROPIT.BUDGET_MB else f"gamma {cfg.DROPIT.GAMMA}"
    return f"DropIT: {cfg.DROPIT.STRATEGY}, {chosen}: {coverage(model).summary()} layers"


def _fit(trainer: Trainer, classifier: Classifier, data: ImageData, checkpoint: Path | None) -> None:
    """Train, from the checkpoint on if there is one; a run that is stopped by a signal prints how to resume."""
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


def _outcome(cfg: CfgNode, trainer: Trainer, callbacks: TrainingCallbacks, checkpoint: Path | None) -> str:
    if cfg.TRY_STEPS:
        return f"tried {cfg.TRY_STEPS} steps and an evaluation; nothing was written"
    if not callbacks.speed.measured:
        return f"nothing left to train: {checkpoint} is at the end of SOLVER.MAX_EPOCHS {cfg.SOLVER.MAX_EPOCHS}"
    return _summary(trainer, callbacks)


def _summary(trainer: Trainer, callbacks: TrainingCallbacks) -> str:
    metrics, cache = trainer.callback_metrics, callbacks.cache
    accuracy = "not evaluated"
    if "val/acc1" in metrics:
        best = callbacks.best.best_model_score
        accuracy = f"acc1 {metrics['val/acc1']:.4f} (best {best:.4f}), acc5 {metrics['val/acc5']:.4f}"
    change = (cache.cache_ratio - 1) * 100
    return "\n".join(
        [
            f"validation   {accuracy}",
            f"cache        {cache.cache_mb:.2f} MiB saved for backward, {cache.dense_mb:.2f} plain ({change:+.1f} %)",
            f"time         {callbacks.speed.step_seconds * 1000:.1f} ms per step",
            f"logs         {trainer.logger.log_dir}",  # type: ignore[union-attr]
        ]
    )
