"""Check a config: each value, values together, those of a checkpoint, and keys that have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from yacs.config import CfgNode

from dropit.training.config.keys import KEYS, Key, flatten
from dropit.training.errors import ConfigError, describe, suggest


def check(cfg: CfgNode, origins: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first value that is not allowed; ``origins`` says where each key was given."""
    values = flatten(cfg)

    def refuse(name: str, must: str) -> NoReturn:
        raise ConfigError(f"{name} must be {must}, got {values[name]!r} ({origins.get(name, 'default')})")

    for name, key in KEYS.items():
        if not key.allowed.fits(values[name]):
            refuse(name, key.allowed.text + (suggest(values[name], key.allowed.names) if key.allowed.names else ""))
    shares = cfg.NUM_NODES * cfg.NUM_GPUS * cfg.SOLVER.ACCUMULATE
    if cfg.SOLVER.BATCH_SIZE % shares:
        refuse("SOLVER.BATCH_SIZE", f"a multiple of NUM_NODES * NUM_GPUS * SOLVER.ACCUMULATE ({shares}), its shares")
    if cfg.SOLVER.ACCUMULATE > 1 and cfg.DROPIT.PROBE_EVERY:
        refuse("DROPIT.PROBE_EVERY", "0 with SOLVER.ACCUMULATE, as it compares the gradients of one batch")
    if cfg.PARALLEL == "fsdp" and (cfg.SOLVER.EMA or cfg.DROPIT.PROBE_EVERY):
        refuse("PARALLEL", "ddp with SOLVER.EMA or DROPIT.PROBE_EVERY, which need whole weights")


def doubtful(cfg: CfgNode) -> list[str]:
    """Return a line for each combination of values that is allowed, but hardly meant."""
    solver, lines = cfg.SOLVER, []
    if solver.WARMUP_EPOCHS > solver.MAX_EPOCHS:
        lines.append(f"SOLVER.WARMUP_EPOCHS {solver.WARMUP_EPOCHS} outlasts SOLVER.MAX_EPOCHS {solver.MAX_EPOCHS}")
    late = [epoch for epoch in solver.MILESTONES if epoch >= solver.MAX_EPOCHS]
    if late and solver.SCHEDULE == "multistep":
        lines.append(f"SOLVER.MILESTONES {late} come after SOLVER.MAX_EPOCHS {solver.MAX_EPOCHS}")
    if cfg.CHECK_VAL_EVERY_N_EPOCH > solver.MAX_EPOCHS and not cfg.TRY_STEPS:
        lines.append(
            f"CHECK_VAL_EVERY_N_EPOCH {cfg.CHECK_VAL_EVERY_N_EPOCH} with SOLVER.MAX_EPOCHS {solver.MAX_EPOCHS} is no "
            f"evaluation, and no best.ckpt"
        )
    return lines


def check_same(kept: str, cfg: CfgNode, sections: tuple[str, ...], source: object) -> None:
    """Raise ConfigError where the config that a checkpoint keeps, as text, differs from ``cfg`` in the sections."""
    for key, (before, now) in differing(kept, cfg, sections).items():
        if key != "MODEL.PRETRAINED":
            raise ConfigError(f"{source} does not fit: checkpoint {key} {before}, config {now}")


def differing(kept: str, cfg: CfgNode, sections: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Return by key, of the sections, where that config differs: its value, and that of ``cfg``."""
    try:
        before = flatten(CfgNode.load_cfg(kept))
    except Exception as error:  # what another hand has written can raise nearly anything
        raise ConfigError(f"the checkpoint's config cannot be read ({describe(error)})") from error
    return {
        key: (before[key], value)
        for key, value in flatten(cfg).items()
        if key.startswith(sections) and before.get(key, value) != value
    }


def ineffective(cfg: CfgNode) -> list[str]:
    """Return a line for the keys that are not at their defaults, but have no effect under the other settings."""
    values = flatten(cfg)
    ignored: dict[str, list[str]] = {}
    for name, key in KEYS.items():
        need = _unmet(key, cfg)
        if need and values[name] != key.default:
            ignored.setdefault(need, []).append(f"{name} {values[name]}")
    return [
        f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect {need}" for need, keys in ignored.items()
    ]


def _unmet(key: Key, cfg: CfgNode) -> str | None:
    return next((need.otherwise for need in key.needs if not need.holds(cfg)), None)
