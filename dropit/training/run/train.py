"""python train.py --mode train: train, evaluate as the config says, and print what came out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning import Trainer
from torch import nn
from yacs.config import CfgNode

from dropit import coverage
from dropit.training.builders.data import build_data
from dropit.training.builders.machine import processes
from dropit.training.builders.model import build_module, checkpoint_bytes
from dropit.training.builders.trainer import TrainingCallbacks, build_callbacks, build_trainer
from dropit.training.callbacks.saving import Interruption
from dropit.training.checkpoint import saved
from dropit.training.checkpoint.writer import check_space
from dropit.training.config.check import check_same, differing
from dropit.training.data.loading import ImageData, lost_worker
from dropit.training.errors import ConfigError, SetupError, UserError, describe
from dropit.training.model.classifier import Classifier
from dropit.training.processes import end_others, is_of_lost_peer
from dropit.training.run.directory import RunDirectory
from dropit.training.run.memory import is_of_memory, out_of_memory
from dropit.training.run.start import run_dir, say, start

# Sections and keys that must equal those of a checkpoint: the model's, and what the optimizer's state depends on.
_SAME = (
    *("DATASET", "MODEL.", "DROPIT.", "INPUT.SIZE", "SEED"),
    *("SOLVER.OPTIMIZER", "SOLVER.NO_DECAY", "SOLVER.LAYER_DECAY"),
)
_APPLIED = ("SOLVER.LR", "SOLVER.MOMENTUM", "SOLVER.BETAS", "SOLVER.WEIGHT_DECAY")  # by SolverSettings


def train(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Train, evaluate as often as the config says, and print what came out."""
    cfg = start(cfg_path, overrides)
    if cfg.CKPT and not resume:
        raise ConfigError("CKPT is for --resume or --mode eval; to start from weights use MODEL.PRETRAINED")
    directory = run_dir(cfg_path, cfg.OUTPUT_DIR)
    found = _find_last(cfg, directory) if resume else None
    data = build_data(cfg)
    classifier = _build(cfg, data, resume=resume)
    for key, (before, now) in found.changed.items() if found else ():
        say(f"resumed      with {key} {now}, which was {before}")
    callbacks = build_callbacks(cfg, new_settings=bool(found and found.changed))
    held = None if cfg.TRY_STEPS else _hold(directory, found and found.path)
    try:
        _run(cfg, directory, classifier, data, callbacks, found, held)
    except BaseException:
        if held is not None and not callbacks.saving.steps:
            held.discard()
        raise


def _run(
    cfg: CfgNode,
    directory: Path,
    classifier: Classifier,
    data: ImageData,
    callbacks: TrainingCallbacks,
    found: _Found | None,
    held: RunDirectory | None,
) -> None:
    """Train in the directory that is held, and print what came out."""
    if held is not None:  # best.ckpt and last.ckpt, if they are not there yet, and one that is being written
        check_space(held.path, (3 if held.is_new else 1) * checkpoint_bytes(classifier.model, cfg))
    steps = data.steps_per_epoch(processes(cfg)) // cfg.SOLVER.ACCUMULATE
    trainer = build_trainer(
        cfg,
        directory,
        callbacks.all,
        held.path.name if held else None,
        log_every=max(1, min(10, steps)),
        # What a killed run has logged beyond its checkpoint is logged again.
        purge_from=found.step if found and held and not held.is_new else None,
    )
    if cfg.MODEL.DROPIT:
        say(_converted(cfg, classifier.model))
    checkpoint = found.path if found else None
    _fit(cfg, trainer, classifier, data, checkpoint, callbacks)
    if trainer.is_global_zero:
        print(_outcome(cfg, trainer, callbacks, checkpoint))
    if trainer.is_global_zero and data.skipped:
        print(f"unreadable   {len(data.skipped)} images were left out, the first of them {data.skipped[0]}")


@rank_zero_only
def _hold(directory: Path, checkpoint: Path | None) -> RunDirectory:
    """Return the version_N that this run writes to: a resumed run's own, or a new one."""
    if checkpoint is not None and directory.resolve() in checkpoint.resolve().parents:
        return RunDirectory.take_up(saved.version_dir(checkpoint))
    return RunDirectory.claim(directory)


class _Found(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    step: int  # steps that it has behind it
    changed: dict[str, tuple[Any, Any]]  # of _APPLIED: what it had, and what the config has


def _find_last(cfg: CfgNode, directory: Path) -> _Found:
    """Return the checkpoint to go on from: CKPT, or the newest run's last.ckpt, or its best.ckpt if that is damaged."""

    def fits(path: Path) -> _Found:
        checkpoint = saved.read(path)
        check_same(checkpoint["config"], cfg, _SAME, path)
        for before, now in differing(checkpoint["config"], cfg, ("SOLVER.EMA",)).values():
            if not (before and now):
                raise ConfigError(f"{path} does not fit: checkpoint SOLVER.EMA {before}, config {now}")
        changed = differing(checkpoint["config"], cfg, _APPLIED)
        if cfg.SOLVER.NO_DECAY and not all(changed.get("SOLVER.WEIGHT_DECAY", (1, 1))):
            raise ConfigError(
                f"{path} does not fit: SOLVER.WEIGHT_DECAY {changed['SOLVER.WEIGHT_DECAY'][0]} in it, "
                f"{cfg.SOLVER.WEIGHT_DECAY} in the config: with SOLVER.NO_DECAY the optimizer's state is another"
            )
        return _Found(path, checkpoint["global_step"], changed)

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


def _converted(cfg: CfgNode, model: nn.Module) -> str:
    chosen = f"{cfg.DROPIT.BUDGET_MB:g} MiB" if cfg.DROPIT.BUDGET_MB else f"gamma {cfg.DROPIT.GAMMA}"
    return f"DropIT: {cfg.DROPIT.STRATEGY}, {chosen}: {coverage(model).summary()} layers"


def _fit(
    cfg: CfgNode,
    trainer: Trainer,
    classifier: Classifier,
    data: ImageData,
    checkpoint: Path | None,
    callbacks: TrainingCallbacks,
) -> None:
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
        known = error if isinstance(error, UserError) else lost_worker(error)
        if is_of_memory(error) and trainer.is_global_zero:
            known = out_of_memory(cfg, error)
        if known is None and not trainer.is_global_zero and is_of_lost_peer(error):
            known = SetupError(f"another process of this run is lost, which process {trainer.global_rank} waited for")
        if known is None and checkpoint is not None and callbacks.saving.steps is None and trainer.is_global_zero:
            known = SetupError(f"CKPT {checkpoint}: does not fit this run ({describe(error)})")
        if known is None:
            raise
        after = f"; --resume goes on from {callbacks.saving.saved}" if callbacks.saving.saved else ""
        raise type(known)(f"{known}{after}") from error


def _outcome(cfg: CfgNode, trainer: Trainer, callbacks: TrainingCallbacks, checkpoint: Path | None) -> str:
    if cfg.TRY_STEPS:
        return f"tried {cfg.TRY_STEPS} steps and an evaluation; nothing was written"
    if not callbacks.speed.measured and "val/acc1" not in trainer.callback_metrics:
        return f"nothing left to train: {checkpoint} is at the end of SOLVER.MAX_EPOCHS {cfg.SOLVER.MAX_EPOCHS}"
    return _summary(trainer, callbacks)


def _summary(trainer: Trainer, callbacks: TrainingCallbacks) -> str:
    metrics, cache = trainer.callback_metrics, callbacks.cache
    accuracy = "not evaluated"
    if "val/acc1" in metrics:
        best = callbacks.best.best_model_score
        accuracy = f"acc1 {metrics['val/acc1']:.4f} (best {best:.4f}), acc5 {metrics['val/acc5']:.4f}"
    change = (cache.cache_ratio - 1) * 100
    lines = [
        f"validation   {accuracy}",
        f"cache        {cache.cache_mb:.2f} MiB saved for backward, {cache.dense_mb:.2f} plain ({change:+.1f} %)",
    ]
    if callbacks.speed.measured:  # not where only an evaluation was left
        lines.append(f"time         {callbacks.speed.step_seconds * 1000:.1f} ms per step")
    return "\n".join([*lines, f"logs         {trainer.logger.log_dir}"])  # type: ignore[union-attr]
