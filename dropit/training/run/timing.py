"""Where the time of a training step goes: waiting for data, forward, backward, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PARTS = ("waiting for data", "to the device", "forward", "backward", "optimizer")
_WARM_UP = 3

Finish = Callable[[Any], tuple[Tensor, Tensor]]


class Stopwatch:
    """Seconds by part; work on a GPU is waited for at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs inside to the part of this name."""
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start


def time_steps(
    model: nn.Module,
    loader: Iterable[Any],
    finish: Finish,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    device: torch.device,
    *,
    steps: int,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Mean seconds of each of PARTS, over ``steps`` steps after a warm-up. ``finish`` makes a batch of what is loaded.

    ``precision``: what the forward pass runs in.
    """
    batches, watch = _endless(loader), Stopwatch(device)
    for step in range(_WARM_UP + steps):
        if step == _WARM_UP:
            watch = Stopwatch(device)
        with watch.part("waiting for data"):
            loaded = next(batches)
        with watch.part("to the device"):
            images, labels = finish(_to(loaded, device))
        with watch.part("forward"), precision():
            loss = criterion(model(images), labels)
        with watch.part("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with watch.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return {name: seconds / steps for name, seconds in watch.seconds.items()}


def time_loading(loader: Iterable[Any], batches: int) -> float:
    """Seconds that the loader alone takes for a batch, with nothing to wait for it."""
    endless = _endless(loader)
    next(endless)
    start = time.perf_counter()
    for _ in range(batches):
        next(endless)
    return (time.perf_counter() - start) / batches


def as_table(columns: dict[str, dict[str, float]], batch_size: int) -> str:
    """Milliseconds by part, a column for each model, and what they come to."""
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
