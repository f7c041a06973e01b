"""python train.py --mode info: what a training step computes and saves for backward, predicted from shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from dropit import coverage, estimate_cache
from dropit.training.builders.conversion import convert_layers
from dropit.training.builders.machine import batch_size
from dropit.training.builders.model import build_network, optimizer_slots
from dropit.training.errors import ConfigError
from dropit.training.model.sizes import build_on_meta, forward_flops, step_memory
from dropit.training.run.start import read_config

MIB = 2**20


def info(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print what a step of one process would compute and save for backward, without taking it."""
    if resume:
        raise ConfigError("--resume is for --mode train")
    cfg = read_config(cfg_path, overrides)
    describe(
        f"{cfg.MODEL.ARCH} on {cfg.DATASET}",
        lambda: build_network(cfg),
        (lambda: convert_layers(build_network(cfg), cfg)) if cfg.MODEL.DROPIT else None,
        (batch_size(cfg), 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE),
        optimizer_slots=optimizer_slots(cfg),
        budget=int(cfg.DROPIT.BUDGET_MB * MIB) if cfg.MODEL.DROPIT else 0,
    )


def describe(
    title: str,
    plain: Callable[[], nn.Module],
    converted: Callable[[], nn.Module] | None,
    input_shape: Sequence[int],
    *,
    optimizer_slots: int,
    budget: int = 0,
) -> None:
    """Print the model's size and work, its coverage, its cache and the memory that a step is predicted to need.

    ``plain`` and ``converted`` build the model; ``converted`` is None where nothing is dropped. ``input_shape``: of
    one process's batch, (N, C, H, W). ``optimizer_slots``: tensors that the optimizer keeps for each parameter.
    ``budget``: bytes that the cache may have, if not 0; how they are spent is measured only when training starts.
    """
    plain_model = build_on_meta(plain)
    model = plain_model if converted is None else build_on_meta(converted)
    shape = " x ".join(map(str, input_shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model        {title}, {parameters / 1e6:.2f} M parameters")
    print(f"input        {shape}, float32, on each process")
    flops = forward_flops(model, input_shape)
    print(f"work         {flops / 1e9:.2f} GFLOP per sample, forward; three times that in a step")
    if converted is not None:
        _print_coverage(model)
    if budget:
        print(f"budget       {budget / MIB:g} MiB of cache, spent as measured when training starts; not in the tables")
    print()
    cache = estimate_cache(model, input_shape)
    if converted is None:
        cache.show()
    else:
        cache.show(estimate_cache(plain_model, input_shape))
    print()
    _print_peak(model, input_shape, budget or cache.total_bytes, optimizer_slots)


def _print_coverage(model: nn.Module) -> None:
    report = coverage(model)
    print(f"layers       {report.summary()}")
    rest = Counter((row.type, row.reason) for row in report if row.reason)
    for (kind, reason), count in rest.most_common():
        print(f"             {kind} x{count}: {reason}")


def _print_peak(model: nn.Module, input_shape: Sequence[int], cache: int, optimizer_slots: int) -> None:
    parts = step_memory(model, input_shape, cache, optimizer_slots)
    print("predicted peak of a step, MiB")
    for name, nbytes in parts.items():
        print(f"  {name:20}{nbytes / MIB:10.1f}")
    print(f"  {'total':20}{sum(parts.values()) / MIB:10.1f}")
