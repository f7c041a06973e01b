"""The optimizer and its schedule as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from dropit.training.errors import ConfigError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("multistep", "cosine")
# Kinds of parameters that weight decay may leave out: those of normalization layers, every bias, and position
# embeddings with class tokens.
NO_DECAY = ("norm", "bias", "position")


@dataclass(frozen=True)
class Recipe:
    """The optimizer and its schedule, in epochs; raises ConfigError for a least rate above the rate."""

    lr: float
    max_epochs: int
    optimizer: str = "sgd"  # of OPTIMIZERS
    momentum: float = 0.9  # of sgd
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()  # of NO_DECAY
    layer_decay: float = 1.0  # factor of the learning rate from each block to the one before
    schedule: str = "multistep"  # of SCHEDULES
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ConfigError(f"SOLVER.MIN_LR must be at most SOLVER.LR ({self.lr:g}), got {self.min_lr:g}")
