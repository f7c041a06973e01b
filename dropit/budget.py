"""Spend a budget of bytes where it lowers the gradient's error most.

Dropping leaves the gradients of activations exact, so what it costs one layer's weight gradient is independent of all
other layers: a few steps on one batch, each with another gamma for all layers, give every layer's squared error and its
bytes. Quantization's error reaches the gradients of all layers before, and how much of it does cannot be told from one
layer (in a ViT the first attention makes a third of it, the second hardly any), so that there each layer is measured in
a step of its own. Rounding errors of different layers are independent: their squares add up (ViT-B/16: to 2 % of what
all layers together err). The choice of an option for each layer with the least error in sum is then found exactly.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropit.layers import PackedInputLayer, QuantizedLayer
from dropit.layers.attention import DropITMultiheadAttention
from dropit.memory import CacheMeter

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Where in the range of gamma a step is taken: closer where much is dropped, as there an element more counts most.
_PARTS = (1.0, 0.95, 0.875, 0.75, 0.5, 0.0)
_BETWEEN = 8  # values of gamma from one step's to the next's
_CELLS = 20_000  # that the bytes to spend are cut into
_CLOSE = 0.985  # a part of the budget that is near enough
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


class Choice(NamedTuple):
    """How a layer stores what it keeps: ``gamma`` and ``value_dtype`` of its packed input, ``bits`` of all else."""

    gamma: float = 0.0
    value_dtype: torch.dtype | None = None
    bits: int | None = None


Setting = dict[str, Choice]  # of each layer by name
Configure = Callable[[Setting], None]


class Option(NamedTuple):
    """One way to treat an item, its bytes, and its squared error."""

    choice: Choice
    nbytes: float
    error: float


class Item(NamedTuple):
    """Layers that are treated alike, as they hold something together, and the ways to treat them."""

    names: list[str]
    options: list[Option]


class Plan:
    """The options of all items with the least error in sum, for any number of bytes: a knapsack, by cells of bytes."""

    def __init__(self, items: list[Item]) -> None:
        self._items = [Item(item.names, _worthwhile(item.options)) for item in items]
        self.span = sum(item.options[-1].nbytes - item.options[0].nbytes for item in self._items)
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
            error = least[: len(least) - cells] + option.error
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
) -> None:
    """Choose and apply the setting under which ``forward()`` holds at most ``budget`` bytes.

    ``configure`` applies a setting. ``loss_fn``: of what ``forward`` returns; its own cache is not counted.
    ``value_dtype``: what kept values are stored in, but where all are kept as they are. ``levels``: the numbers of bits
    that may be chosen. Raises ValueError where not even the least setting fits.
    """
    calibration = _Calibration(model, configure, forward, loss_fn)
    gammas = [gamma_min + (gamma_max - gamma_min) * part for part in _PARTS]
    with _nothing_at_zero(model):
        plan = Plan(calibration.items(gammas, value_dtype, levels))
    configure(plan.setting(0))
    least = calibration.held()
    if least > budget:
        raise ValueError(
            f"budget of {budget / 2**20:.1f} MiB cannot be met: the least that this model holds is "
            f"{least / 2**20:.1f} MiB"
        )
    # What the model holds is almost, but not quite, the sum of its items: what is spent is moved until it fits.
    low, high, spare = 0.0, plan.span + 1, float(budget - least)
    best, chosen = least, plan.setting(0)
    for _ in range(_TRIES):
        setting = plan.setting(spare)
        configure(setting)
        held = calibration.held()
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
    configure(chosen)


class _Run(NamedTuple):
    """A step: gradients of each layer's own parameters, and bytes held by module."""

    grads: dict[str, Tensor]
    held: dict[str, int]


class _Calibration:
    """Steps on one batch, each of which leaves the model's state as it found it."""

    def __init__(
        self,
        model: nn.Module,
        configure: Configure,
        forward: Callable[[], Any],
        loss_fn: Callable[[Any], Tensor],
    ) -> None:
        self._model, self._configure, self._forward, self._loss_fn = model, configure, forward, loss_fn
        named = dict(model.named_modules())
        self._packing = [fqn for fqn, module in named.items() if isinstance(module, PackedInputLayer)]
        quantizing = (QuantizedLayer, DropITMultiheadAttention)
        self._quantizing = [fqn for fqn, module in named.items() if isinstance(module, quantizing)]
        self._together: list[tuple[str, ...]] = []  # names of layers that hold one tensor, in some setting

    def items(self, gammas: list[float], value_dtype: torch.dtype, levels: tuple[int, ...]) -> list[Item]:
        """What there is to choose. The first of ``levels`` is that under which dropping is measured as well."""
        order = self._order()
        exact = self._step(self._all(Choice()))
        quantized = {bits: self._step(self._all(Choice(bits=bits))) for bits in levels}
        drops: dict[tuple[float, int | None], tuple[dict[str, int], dict[str, float]]] = {}
        for gamma in gammas:
            for bits, without in ((None, exact), (levels[0], quantized[levels[0]])):
                grads, held = self._step(self._all(Choice(gamma, value_dtype, bits)))
                drops[gamma, bits] = held, {fqn: _error([fqn], grads, without.grads) for fqn in self._packing}
        # Each layer's error is measured where it is largest; in other numbers of bits all layers' errors scale alike.
        overall = {bits: _error(list(exact.grads), run.grads, exact.grads) for bits, run in quantized.items()}
        scales = {bits: overall[bits] / max(overall[levels[-1]], 1e-30) for bits in levels}

        def of_packing(names: list[str], bits: int | None) -> list[Option]:
            """Ways to pack the inputs, with all else in ``bits``: bytes and error beyond none dropped."""
            measured = bits and levels[0]
            nothing = (exact if bits is None else quantized[levels[0]]).held
            kept = []
            before = sum(nothing[fqn] for fqn in names)
            for gamma in gammas:
                held, errors = drops[gamma, measured]
                nbytes = sum(held[fqn] for fqn in names) - before
                error = sum(errors[fqn] for fqn in names if fqn in errors)
                kept.append(Option(Choice(gamma, value_dtype, bits), nbytes, error))
            if gammas[-1] > 0 and kept[-1].nbytes <= 0:
                return _and_between(kept)
            return [*_and_between(kept), Option(Choice(bits=bits), 0.0, 0.0)]  # or dropping would free nothing

        items = []
        for names in self._groups(order):
            options = of_packing(names, None)
            if any(fqn in self._quantizing for fqn in names):
                alone = self._step(self._all(Choice()) | dict.fromkeys(names, Choice(bits=levels[-1])))
                error = _error(list(exact.grads), alone.grads, exact.grads)
                for bits in levels:
                    nbytes = sum(quantized[bits].held[fqn] - exact.held[fqn] for fqn in names)
                    options += [
                        Option(choice, nbytes + more, error * scales[bits] + dropped)
                        for choice, more, dropped in of_packing(names, bits)
                    ]
            items.append(Item(names, options))
        return items

    def _all(self, choice: Choice) -> Setting:
        return dict.fromkeys({*self._packing, *self._quantizing}, choice)

    def _groups(self, order: dict[str, int]) -> list[list[str]]:
        names = [fqn for fqn in {*self._packing, *self._quantizing} if fqn in order]
        apart = [(fqn,) for fqn in names]
        groups = _merged([*apart, *(tuple(fqn for fqn in each if fqn in names) for each in self._together)])
        return sorted(groups, key=lambda group: min(order[fqn] for fqn in group))

    def held(self) -> int:
        """Bytes that a forward pass holds now."""
        with _unchanged(self._model), CacheMeter(self._model, retain=False) as meter:
            output = self._forward()
        del output
        return meter.total_bytes

    def _step(self, setting: Setting) -> _Run:
        self._configure(setting)
        grads = [parameter.grad for parameter in self._model.parameters()]
        for parameter in self._model.parameters():
            parameter.grad = None
        with _unchanged(self._model), CacheMeter(self._model) as meter:
            output = self._forward()
        self._loss_fn(output).backward()
        found = {}
        for fqn, module in self._model.named_modules():
            own = [p.grad.flatten() for p in module.parameters(recurse=fqn in self._packing) if p.grad is not None]
            if own:
                found[fqn] = torch.cat(own)
        for parameter, grad in zip(self._model.parameters(), grads, strict=True):
            parameter.grad = grad
        self._together += meter.sharing()
        return _Run(found, defaultdict(int, meter.by_module()))

    def _order(self) -> dict[str, int]:
        """When each module was first called."""
        self._configure({})
        order: dict[str, int] = {}
        names = {module: fqn for fqn, module in self._model.named_modules()}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            order.setdefault(names[module], len(order))

        handles = [module.register_forward_pre_hook(note) for module in names]
        with _unchanged(self._model):
            output = self._forward()
        del output
        for handle in handles:
            handle.remove()
        return order


def _and_between(options: list[Option]) -> list[Option]:
    """Options that differ in gamma, and more of them: bytes go evenly with gamma, and the error less than evenly."""
    filled = options[:1]
    for a, b in pairwise(options):
        for part in (step / _BETWEEN for step in range(1, _BETWEEN + 1)):
            gamma, nbytes, error = (
                x + (y - x) * part for x, y in ((a.choice.gamma, b.choice.gamma), (a.nbytes, b.nbytes), a[2:] + b[2:])
            )
            filled.append(Option(a.choice._replace(gamma=gamma), nbytes, error))
    return filled


@contextmanager
def _nothing_at_zero(model: nn.Module) -> Iterator[None]:
    """Small random values for a while to weights that start at zero, as a ViT's head: they let no gradient through."""
    zeros = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and parameter.is_floating_point() and not parameter.any()
    ]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in zeros:
            parameter.normal_(std=0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers are afterwards what they were before."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _error(names: list[str], grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Squared error of the gradients of some layers."""
    found = [fqn for fqn in names if fqn in exact]
    return sum((grads[fqn] - exact[fqn]).double().square().sum().item() for fqn in found)


def _merged(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Groups that share a name, as a layer that is called twice makes them, as one."""
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching] + [set(group).union(*touching)]
    return [sorted(group) for group in merged]
