"""python train.py --mode time: where the time of a training step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dropit.training.builders.data import build_data
from dropit.training.builders.machine import autocast, batch_size, pick_accelerator
from dropit.training.builders.model import build_module
from dropit.training.errors import ConfigError
from dropit.training.model.classifier import Batch, Classifier
from dropit.training.run.start import start

PARTS = ("waiting for data", "to the device", "forward", "backward", "optimizer")
_WARM_UP = 3
_STEPS = 20


def time(cfg_path: str, overrides: Sequence[str], *, resume: bool = False) -> None:
    """Print where the time of a step of one process goes, and what the loader alone could do."""
    if resume:
        raise ConfigError("--resume is for --mode train")
    cfg = start(cfg_path, overrides)
    data = build_data(cfg)
    loader = data.train_dataloader()
    device = torch.device("cuda" if pick_accelerator(cfg) == "gpu" else "cpu")
    steps, size = cfg.TRY_STEPS or _STEPS, batch_size(cfg)
    print(f"{cfg.MODEL.ARCH} on {cfg.DATASET}: means of {steps} steps of {size} images, on {device}")
    columns = {}
    for name in ("plain", *(["DropIT"] if cfg.MODEL.DROPIT else [])):
        convert = name == "DropIT"
        sample = data.sample() if convert and cfg.DROPIT.BUDGET_MB else None
        classifier = build_module(cfg, convert=convert, sample=sample).to(device).train()
        columns[name] = time_steps(
            classifier, loader, data.train.finish, device, steps=steps, precision=lambda: autocast(cfg)
        )
    print(as_table(columns, size))
    alone = time_loading(loader, steps)
    print(f"the loader alone gives {size / alone:.0f} images/s, {alone * 1e3:.1f} ms for a batch")


class Stopwatch:
    """Seconds by part; each part ends when the GPU has finished its work."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of what runs inside to the part of this name."""
        start = perf_counter()
        yield
        self._wait()
        self.seconds[name] += perf_counter() - start


def time_steps(
    classifier: Classifier,
    loader: Iterable[Any],
    finish: Callable[[Any], Batch],
    device: torch.device,
    *,
    steps: int,
    precision: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Return the mean seconds of each of PARTS, over ``steps`` steps after a warm-up.

    ``finish`` makes a batch of what is loaded; ``precision`` is what the forward pass runs in.
    """
    optimizer = classifier.configure_optimizers()["optimizer"]
    batches, watch = _endless(loader), Stopwatch(device)
    for step in range(_WARM_UP + steps):
        if step == _WARM_UP:
            watch = Stopwatch(device)
        with watch.part("waiting for data"):
            loaded = next(batches)
        with watch.part("to the device"):
            images, labels = finish(_to(loaded, device))
        with watch.part("forward"), precision():
            loss = classifier.criterion(classifier(images), labels)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return {name: seconds / steps for name, seconds in watch.seconds.items()}


def time_loading(loader: Iterable[Any], batches: int) -> float:
    """Return the seconds that the loader alone takes for a batch, while nothing else runs."""
    endless = _endless(loader)
    next(endless)
    start = perf_counter()
    for _ in range(batches):
        next(endless)
    return (perf_counter() - start) / batches


def as_table(columns: dict[str, dict[str, float]], batch_size: int) -> str:
    """Return milliseconds by part, a column for each model, and their totals."""
    lines = [("ms", *columns)]
    lines += [(part, *(f"{seconds[part] * 1e3:.1f}" for seconds in columns.values())) for part in PARTS]
    totals = [sum(seconds.values()) for seconds in columns.values()]
    lines.append(("a step", *(f"{total * 1e3:.1f}" for total in totals)))
    lines.append(("samples/s", *(f"{batch_size / total:.0f}" for total in totals)))
    shares = (seconds["waiting for data"] / total for seconds, total in zip(columns.values(), totals, strict=True))
    lines.append(("share of data", *(f"{share:.1%}" for share in shares)))
    return "\n".join(f"{name:18}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in lines)


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _to(loaded: Any, device: torch.device) -> Any:
    return type(loaded)(*(each.to(device) if isinstance(each, Tensor) else each for each in loaded))
