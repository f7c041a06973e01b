"""coverage: say of each layer of a model whether DropIT makes it save less, or why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dropit.layers import (
    PARTS_OF_FORWARD,
    SWAPS,
    DropITLayer,
    in_the_way,
    is_converted,
    is_lossless,
    needs_bits,
    parent_in_table,
    plain_type,
    swap_for,
)
from dropit.memory import CacheMeter

# Layers that save their input for a weight gradient: the report has them even if their type is not in the table.
WEIGHTED = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.modules.conv._ConvNd, nn.MultiheadAttention)
PLAIN = "plain: left out, or to_dropit was not called"
_REPLACED = "not converted: its forward was replaced on the module itself"
_NOT_QUANTIZED = 'plain: compress="int8", for one, would save it in fewer bits'


@dataclass(frozen=True)
class LayerCoverage:
    """One layer of the report. ``reason`` is empty where the layer is converted.

    ``note`` says what keeps a converted layer from helping, where a CacheMeter has seen it.
    """

    fqn: str
    type: str
    reason: str
    note: str = ""

    @property
    def status(self) -> str:
        """ "converted", and what keeps it from helping; or why it is not."""
        return self.reason or ", but ".join(filter(None, ["converted", self.note]))


class Coverage(list[LayerCoverage]):
    """The layers of a model that DropIT could make save less, and whether it does."""

    @property
    def converted(self) -> int:
        """How many are converted."""
        return sum(not row.reason for row in self)

    def __str__(self) -> str:
        rows = [("layer", "type", "status"), *((row.fqn or "(root)", row.type, row.status) for row in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{fqn:{widths[0]}}  {kind:{widths[1]}}  {status}" for fqn, kind, status in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: "converted 9 of 17", and how many of these do not help."""
        without_effect = sum(bool(row.note) for row in self)
        but = f", of which {without_effect} free nothing (their notes say why)" if without_effect else ""
        return f"converted {self.converted} of {len(self)}{but}"


def coverage(model: nn.Module, meter: CacheMeter | None = None) -> Coverage:
    """Say of each layer that DropIT could make save less whether it is converted, or why not.

    Args:
        model: The model, converted or not.
        meter: One that measured a step of this model. With it the report says also which converted layers free nothing:
            those whose input another operation saves as well (a functional ``F.relu`` cannot be swapped), and those
            that were not called.

    Returns:
        A list of rows with ``fqn``, ``type`` and ``status``; ``str()`` of it is a table.

    Example:
        >>> import torch, dropit
        >>> model = dropit.to_dropit(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))
        >>> print(coverage(model))
        layer  type    status
        0      Linear  converted
        1      ReLU    converted
        converted 2 of 2
    """
    return Coverage(
        LayerCoverage(fqn, plain_type(module).__name__, _reason(module), _note(module, fqn, meter))
        for fqn, module in reportable_layers(model)
    )


def _note(module: nn.Module, fqn: str, meter: CacheMeter | None) -> str:
    if meter is None or not isinstance(module, DropITLayer) or not is_converted(module) or is_lossless(module):
        return ""
    if not meter.has_run(fqn):
        return "not called: another module may read its weight by itself"
    elsewhere = meter.saved_elsewhere(fqn)
    savers = " and ".join(f"{saver} ({nbytes / 2**20:.2f} MiB)" for saver, nbytes in elsewhere.items())
    return f"its input is saved by {savers} as well" if savers else ""


def reportable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that DropIT could make save less, or that save their input for a weight gradient, with names."""
    # The children of the one are never called, those of the other compute weights.
    closed = [module for module in model.modules() if isinstance(module, (nn.MultiheadAttention, ParametrizationList))]
    inside = {id(child) for each in closed for child in each.children()}
    for fqn, module in model.named_modules():
        known = swap_for(plain_type(module)) is not None or isinstance(module, (*WEIGHTED, *SWAPS))
        if known and id(module) not in inside:
            yield fqn, module


def _reason(module: nn.Module) -> str:
    if is_converted(module):
        return "" if _reaches_ours(module) else _REPLACED
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "not converted: it has no shape yet; run a forward pass first"
    plain = plain_type(module)
    swap = swap_for(plain)
    if swap is not None:
        return obstacle(module, swap) or (_NOT_QUANTIZED if needs_bits(swap) else PLAIN)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "not converted: what its kernel saves is out of reach"
    parent = parent_in_table(plain)
    if parent is not None:
        return f"not converted: its forward is not {parent.__name__}'s"
    return "not converted: this type is not supported"


def obstacle(module: nn.Module, swap: type[DropITLayer]) -> str:
    """Return why the module cannot be converted; an empty text if it can."""
    if isinstance(module, DropITLayer):
        return ""
    if not vars(module).keys().isdisjoint(PARTS_OF_FORWARD):  # as accelerate's hooks set it: a class would not matter
        return _REPLACED
    name = in_the_way(module, swap)
    return f"not converted: its own {name!r} is a name that DropIT's layer needs" if name else ""


def _reaches_ours(module: nn.Module) -> bool:
    """Whether a forward that was set on a converted module, if one was, contains that of its class, and may call it."""
    if vars(module).keys().isdisjoint(PARTS_OF_FORWARD):
        return True
    return any(_contains(value, module) for value in vars(module).values() if callable(value))


def _contains(found: Any, module: nn.Module, depth: int = 5) -> bool:
    """Whether ``found`` is the forward of the module's class, or has it: wrapped, in a closure, or as an attribute."""
    ours = type(module).forward
    if found is ours or (isinstance(found, MethodType) and found.__func__ is ours):
        return getattr(found, "__self__", module) is module
    if depth == 0 or isinstance(found, (nn.Module, Tensor, type)):
        return False
    return any(
        _contains(part, module, depth - 1) for part in _parts(found) if callable(part) or isinstance(part, tuple)
    )


def _parts(found: Any) -> Iterator[Any]:
    if isinstance(found, (tuple, list)):
        yield from found
    elif isinstance(found, partial):
        yield from (found.func, *found.args, *found.keywords.values())
    elif isinstance(found, MethodType):
        yield found.__func__
        yield from getattr(found.__self__, "__dict__", {}).values()
    yield from getattr(found, "__dict__", {}).values()
    yield from getattr(found, "__defaults__", None) or ()
    for cell in getattr(found, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty as yet
            yield cell.cell_contents
