"""Spend a budget of bytes where it lowers the gradient's error most.

What each way to treat a layer costs is measured (:mod:`dropit.calibration`); the choice of one for each layer with the
least error in sum is then found exactly, and moved until what the model really holds fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dropit.calibration import Calibration, Configure, Item, Option, Setting, in_training

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Where in the range of gamma a step is taken: closer where much is dropped, as there an element more counts most.
_PARTS = (1.0, 0.95, 0.875, 0.75, 0.5, 0.0)
_CELLS = 20_000  # that the bytes to spend are cut into
_CLOSE = 0.985  # a part of the budget that is near enough
_ENOUGH = 0.97  # and one below which errors that do not matter are traded for the rest
_NEGLIGIBLE = 1e-9  # such an error: gradients are off by 3e-5
_TRIES = 10


def parse_bytes(given: int | str) -> int:
    """``"4 GiB"``, ``"500 MB"`` or a number of bytes. Raises ValueError for anything else, and for nothing."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", str(given).lower())
    try:
        nbytes = int(float(match[1]) * UNITS[match[2]])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"budget must be a number of bytes or text such as '4 GiB', got {given!r}")
    return nbytes


class Plan:
    """The options of all items with the least error in sum, for any number of bytes: a knapsack, by cells of bytes.

    ``unspent``: the error that all bytes count as where they are left over.
    """

    def __init__(self, items: list[Item], unspent: float = 0.0) -> None:
        self._items = [Item(item.names, _worthwhile(item.options)) for item in items]
        self.span = sum(item.options[-1].nbytes - item.options[0].nbytes for item in self._items)
        self._price = unspent / max(self.span, 1.0)
        self._cell = max(self.span / _CELLS, 1e-9)
        self._picks: list[Tensor] = []  # of each item, for each number of cells: which option
        # By cells, of which each item may waste a part of one.
        least = torch.zeros(_CELLS + len(items) + 1, dtype=torch.float64)
        for item in self._items:
            least, pick = self._with(item, least)
            self._picks.append(pick)

    def _with(self, item: Item, least: Tensor) -> tuple[Tensor, Tensor]:
        errors = torch.full_like(least, float("inf"))
        pick = torch.zeros(len(least), dtype=torch.int16)
        for index, option in enumerate(item.options):
            cells = self._cells(item, index)
            error = least[: len(least) - cells] + option.error - self._price * option.nbytes
            better = error < errors[cells:]
            errors[cells:][better] = error[better]
            pick[cells:][better] = index
        return errors, pick

    def _cells(self, item: Item, index: int) -> int:
        exact = (item.options[index].nbytes - item.options[0].nbytes) / self._cell
        return math.ceil(round(exact, 6))

    def setting(self, spare: float) -> Setting:
        """What to choose where ``spare`` bytes may be held beyond the least that the items can."""
        chosen: Setting = {}
        cells = _CELLS + len(self._items)
        left = cells if spare >= self.span else max(int(spare / self._cell), 0)
        for item, pick in zip(reversed(self._items), reversed(self._picks), strict=True):
            index = int(pick[left])
            chosen.update(dict.fromkeys(item.names, item.options[index].choice))
            left -= self._cells(item, index)
        return chosen


def _worthwhile(options: list[Option]) -> list[Option]:
    """Those that no other beats, by bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def fit(
    model: nn.Module,
    budget: int,
    configure: Configure,
    forward: Callable[[], Any],
    loss_fn: Callable[[Any], Tensor],
    *,
    gamma_min: float,
    gamma_max: float,
    value_dtype: torch.dtype,
    levels: tuple[int, ...],
    on_step: Callable[[int, int], None] | None = None,
) -> Setting:
    """The setting of least error under which ``forward()`` holds at most ``budget`` bytes.

    ``configure`` applies a setting. ``loss_fn``: of what ``forward`` returns; its own cache is not counted.
    ``value_dtype``: what kept values are stored in, but where all are kept as they are. ``levels``: the numbers of bits
    that may be chosen. ``on_step``: called with the number of steps taken and of all. Raises ValueError where not even
    the least setting fits. A model in eval mode is measured in training mode.
    """
    gammas = sorted({gamma_min + (gamma_max - gamma_min) * part for part in _PARTS}, reverse=True)
    calibration = Calibration(
        model, configure, forward, loss_fn, gammas=gammas, value_dtype=value_dtype, levels=levels, on_step=on_step
    )
    with in_training(model):
        items = calibration.items()
        plan = Plan(items)
        least = calibration.held(plan.setting(0))
        if least > budget:
            raise ValueError(
                f"budget of {budget / 2**20:.1f} MiB cannot be met: the least that this model holds is "
                f"{least / 2**20:.1f} MiB"
            )
        held, chosen = _spend(plan, budget, least, calibration.held)
        if held < _ENOUGH * budget and budget - least < plan.span:
            fuller, other = _spend(Plan(items, _NEGLIGIBLE), budget, least, calibration.held)
            chosen = other if fuller > held else chosen
        return chosen


def _spend(plan: Plan, budget: int, least: int, measure: Callable[[Setting], int]) -> tuple[int, Setting]:
    """The setting that the plan has for ``budget``, and what it holds.

    That is almost, but not quite, the sum of its items: what is spent beyond ``least`` is moved until it fits.
    """
    low, high, spare = 0.0, plan.span + 1, float(budget - least)
    best, chosen = least, plan.setting(0)
    for _ in range(_TRIES):
        setting = plan.setting(spare)
        held = measure(setting)
        if held <= budget:
            low = spare
            if held >= best:
                best, chosen = held, setting
            if held >= _CLOSE * budget or spare >= plan.span:
                break
        else:
            high = spare
        moved = spare + (1 + _CLOSE) / 2 * budget - held
        spare = moved if low < moved < high else (low + high) / 2
    return best, chosen
