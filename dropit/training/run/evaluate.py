"""python train.py --mode eval: loss and accuracies of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dropit.training.builders.data import build_data
from dropit.training.builders.model import build_module
from dropit.training.builders.trainer import build_trainer
from dropit.training.checkpoint import saved
from dropit.training.config.check import check_same
from dropit.training.errors import ConfigError, SetupError, describe
from dropit.training.run.start import run_dir, start

_SAME = ("MODEL.ARCH", "MODEL.NUM_CLASSES", "MODEL.STEM")  # as in the checkpoint


def evaluate(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print loss and accuracies of a checkpoint: CKPT, or the best of this config's newest run."""
    if resume:
        raise ConfigError("--resume is for --mode train; --mode eval reads CKPT or the newest best.ckpt")
    cfg = start(cfg_path, overrides)
    data = build_data(cfg)
    path = Path(cfg.CKPT) if cfg.CKPT else saved.newest(run_dir(cfg_path, cfg.OUTPUT_DIR), "best")
    checkpoint = saved.read(path)
    check_same(checkpoint["config"], cfg, _SAME, path)
    classifier = build_module(cfg, convert=False)
    try:
        classifier.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # what another hand has written can raise nearly anything
        check_same(checkpoint["config"], cfg, ("INPUT.SIZE", "MODEL."), path)
        raise SetupError(f"CKPT {path}: its weights are not this model's ({describe(error)})") from error
    trainer = build_trainer(cfg)
    (metrics,) = trainer.validate(classifier, data, verbose=False)
    if trainer.is_global_zero:
        print(f"checkpoint   {path}")
        print("validation   " + ", ".join(f"{tag.removeprefix('val/')} {metrics[tag]:.4f}" for tag in sorted(metrics)))
