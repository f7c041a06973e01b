"""How every mode starts: read the config, warn, and refuse what cannot run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from yacs.config import CfgNode

from dropit.training.builders.machine import check_machine
from dropit.training.config.check import doubtful, ineffective
from dropit.training.config.load import load
from dropit.training.errors import warn

_KNOWN_WARNINGS = (
    ".*LeafSpec.*",  # Lightning 2.6 on torch >= 2.11
    ".*functional.all_gather is deprecated.*",  # by Lightning 2.6, on torch >= 2.14
    ".*does not have many workers.*",
    ".*will create .* worker processes.*",
    ".*Checkpoint directory .* exists.*",  # on --resume
)

say = rank_zero_only(print)


def start(cfg_path: str, overrides: Sequence[str]) -> CfgNode:
    """Return the config; raises SetupError for what this machine cannot run."""
    cfg = read_config(cfg_path, overrides)
    check_machine(cfg)
    torch.set_float32_matmul_precision("high" if cfg.TRAIN.PRECISION == "tf32" else "highest")
    return cfg


def read_config(cfg_path: str, overrides: Sequence[str]) -> CfgNode:
    """Return the config, and warn of keys that have no effect, or hardly the one that is meant."""
    _quiet()
    cfg = load(cfg_path, overrides)
    for line in (*ineffective(cfg), *doubtful(cfg)):
        warn(line)
    return cfg


def _quiet() -> None:
    """Suppress what Lightning says of itself and of the machine; its warnings stay, but for the known ones."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It ends this process where another is lost, and says so as information.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)


def run_dir(cfg_path: str | Path, output_dir: str | Path) -> Path:
    """Return OUTPUT_DIR/a/b for configs/a/b.yaml: the directory of version_N, one for each run."""
    path = Path(cfg_path).resolve()
    return Path(output_dir) / path.parent.name / path.with_suffix("").name
