"""Spend a budget of bytes where it lowers the gradient's error most.

Dropping leaves the gradients of activations exact, so what it costs one layer's weight gradient is independent of all
other layers and can be measured: a few steps on one batch, each with another gamma for all layers, give every layer's
squared error as a function of its bytes. What quantization costs is spread over the layers that it acts on, by how much
gradient passes through them. The cheapest choice of options is then found along their convex hulls, by error per byte.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dropit.layers import PackedInputLayer, QuantizedLayer
from dropit.layers.attention import DropITMultiheadAttention
from dropit.memory import CacheMeter

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# What is kept is refined where much is dropped: there an element more counts most.
_PARTS = (0.0, 0.5, 0.75, 0.875, 0.95, 1.0)
_CLOSE = 0.985  # a part of the budget that is near enough
_TRIES = 10

Configure = Callable[["Setting"], None]


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


@dataclass
class Setting:
    """Of each layer by name: the gamma of those that drop, and the bits of those that may quantize (None: as it is)."""

    gammas: dict[str, float] = field(default_factory=dict)
    bits: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One way to treat an item: its bytes and its squared error, both against the best way."""

    value: Any
    nbytes: float
    error: float


@dataclass
class Item:
    """Layers that are treated alike, as they read one tensor, and the ways to treat them."""

    names: list[str]
    options: list[Option]
    between: bool  # whether values between those of two options may be chosen

    def hull(self) -> list[Option]:
        """The options that no mixture of others beats, by bytes; each next one lowers the error less per byte."""
        kept: list[Option] = []
        for option in sorted(self.options, key=lambda option: (option.nbytes, option.error)):
            if kept and option.error >= kept[-1].error:
                continue
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
                kept.pop()
            kept.append(option)
        return kept


def _slope(a: Option, b: Option) -> float:
    """By how much the error falls for each byte more."""
    return (a.error - b.error) / max(b.nbytes - a.nbytes, 1e-9)


def solve(items: list[Item], spare: float) -> list[Any]:
    """Each item's value, so that all together take no more than ``spare`` bytes, or the least that they can.

    Steps up the hulls are taken by error per byte, so that more bytes never mean more error.
    """
    hulls = [item.hull() for item in items]
    left = spare - sum(hull[0].nbytes for hull in hulls)
    steps = [
        (_slope(a, b), index, position)
        for index, hull in enumerate(hulls)
        for position, (a, b) in enumerate(pairwise(hull))
    ]
    values = [hull[0].value for hull in hulls]
    reached = [0] * len(items)
    for _, index, position in sorted(steps, key=lambda step: -step[0]):
        if reached[index] != position:
            continue  # a step before this one did not fit
        a, b = hulls[index][position : position + 2]
        cost = b.nbytes - a.nbytes
        if cost <= left:
            values[index] = b.value
            reached[index] += 1
            left -= cost
        elif items[index].between and left > 0:
            values[index] = a.value + (b.value - a.value) * left / cost
            left = 0
    return values


def fit(
    model: nn.Module,
    budget: int,
    configure: Configure,
    forward: Callable[[], Any],
    loss_fn: Callable[[Any], Tensor],
    *,
    gamma_min: float,
    gamma_max: float,
    levels: Iterable[int],
) -> Setting:
    """Choose and apply the setting under which ``forward()`` holds at most ``budget`` bytes.

    ``configure`` applies a setting. ``loss_fn``: of what ``forward`` returns; its own cache is not counted.
    ``levels``: the numbers of bits that may be chosen. Raises ValueError where not even the least setting fits.
    """
    calibration = _Calibration(model, configure, forward, loss_fn)
    grid = [gamma_min + (gamma_max - gamma_min) * part for part in _PARTS]
    with _nothing_at_zero(model):
        items, best = calibration.items(grid, tuple(levels))
    # What the model holds is almost, but not quite, the sum of its items: the target is moved until it fits.
    least = best + sum(item.hull()[0].nbytes for item in items)
    low, high, target = least, float("inf"), float(budget)
    chosen: Setting | None = None
    for _ in range(_TRIES):
        setting = calibration.setting(items, solve(items, max(target, least) - best))
        configure(setting)
        held = calibration.held()
        if held <= budget:
            chosen, low = setting, max(target, low)
            if held >= _CLOSE * budget or target >= best:
                return setting
        else:
            high = target
            if target <= least:
                break
        moved = target + (1 + _CLOSE) / 2 * budget - held
        target = moved if low < moved < high else (low + min(high, best)) / 2
    if chosen is None:
        configure(calibration.setting(items, [item.hull()[0].value for item in items]))
        raise ValueError(
            f"budget of {budget / 2**20:.1f} MiB cannot be met: the least that this model holds is "
            f"{calibration.held() / 2**20:.1f} MiB"
        )
    configure(chosen)
    return chosen


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
        self._packing = [fqn for fqn, m in model.named_modules() if isinstance(m, PackedInputLayer)]
        quantizing = (QuantizedLayer, DropITMultiheadAttention)
        self._quantizing = [fqn for fqn, m in model.named_modules() if isinstance(m, quantizing)]
        self._fixed: dict[str, float] = {}

    def items(self, gammas: list[float], levels: tuple[int, ...]) -> tuple[list[Item], int]:
        """What there is to choose, and the bytes held where nothing is dropped beyond ``gammas[0]`` or quantized."""
        order, groups = self._order_and_groups()
        whole = self._step(self._uniform(0.0, None))
        exact, nothing, _ = whole
        runs = [self._step(self._uniform(gamma, None)) if gamma else whole for gamma in gammas]
        _, base, _ = runs[0]
        items = []
        for group in groups:
            if any(runs[-1][2].held_elsewhere(fqn) for fqn in group):
                self._fixed |= dict.fromkeys(group, 0.0)  # another operation holds the input: dropping frees nothing
                continue
            before = sum(base[fqn] for fqn in group)
            options = [
                Option(gamma, sum(held[fqn] for fqn in group) - before, _error(group, grads, exact))
                for gamma, (grads, held, _) in zip(gammas, runs, strict=True)
            ]
            items.append(Item(group, options, between=True))
        items += self._bits(levels, order, exact, nothing)
        self._configure(self.setting(items, [item.options[0].value for item in items]))
        return items, self.held()

    def _bits(
        self, levels: tuple[int, ...], order: dict[str, int], exact: dict[str, Tensor], nothing: dict[str, int]
    ) -> list[Item]:
        """The error of all layers together is measured, and shared out by how much gradient passes through each."""
        norms = {fqn: grad.double().square().sum().item() for fqn, grad in exact.items()}
        names = [fqn for fqn in self._quantizing if fqn in order]
        through = {
            fqn: sum(norm for other, norm in norms.items() if order.get(other, 0) <= order[fqn]) for fqn in names
        }
        options = {fqn: [Option(None, 0, 0.0)] for fqn in names}
        for bits in levels:
            grads, held, _ = self._step(self._uniform(0.0, bits))
            share = _error(list(norms), grads, exact) / max(sum(through.values()), 1e-30)
            for fqn in names:
                options[fqn].append(Option(bits, held[fqn] - nothing[fqn], share * through[fqn]))
        return [Item([fqn], options[fqn], between=False) for fqn in names]

    def setting(self, items: list[Item], values: list[Any]) -> Setting:
        """The items' values as a setting."""
        setting = Setting(gammas=dict(self._fixed))
        for item, value in zip(items, values, strict=True):
            chosen: dict[str, Any] = setting.gammas if item.between else setting.bits
            chosen.update(dict.fromkeys(item.names, value))
        return setting

    def held(self) -> int:
        """Bytes that a forward pass holds now."""
        with _unchanged(self._model), CacheMeter(self._model, retain=False) as meter:
            output = self._forward()
        del output
        return meter.total_bytes

    def _uniform(self, gamma: float, bits: int | None) -> Setting:
        return Setting(dict.fromkeys(self._packing, gamma), dict.fromkeys(self._quantizing, bits))

    def _step(self, setting: Setting) -> tuple[dict[str, Tensor], dict[str, int], CacheMeter]:
        """Gradients of each layer's own parameters, bytes held by module, and the meter."""
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
        return found, defaultdict(int, meter.by_module()), meter

    def _order_and_groups(self) -> tuple[dict[str, int], list[list[str]]]:
        """When each module was first called, and which packing layers read one tensor."""
        self._configure(self._uniform(0.0, None))
        order: dict[str, int] = {}
        readers: dict[tuple[int, int], list[str]] = defaultdict(list)
        alive: list[Tensor] = []  # so that no two tensors have one id
        names = {module: fqn for fqn, module in self._model.named_modules()}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            fqn = names[module]
            order.setdefault(fqn, len(order))
            if fqn in packing and args and isinstance(args[0], Tensor):
                alive.append(args[0])
                readers[id(args[0]), args[0]._version].append(fqn)

        packing = set(self._packing)
        handles = [module.register_forward_pre_hook(note) for module in names]
        with _unchanged(self._model):
            output = self._forward()
        del output
        for handle in handles:
            handle.remove()
        return order, _merged(readers.values())


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


def _merged(groups: Iterable[list[str]]) -> list[list[str]]:
    """Groups that share a name, as a layer that is called twice makes them, as one."""
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching] + [set(group).union(*touching)]
    return [sorted(group) for group in merged]
