"""Swap a model's layers for DropIT layers and back, and say which were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from dropit.layers import SWAPS, DropITLayer
from dropit.strategies import make_strategy

# Layers that keep their input for a weight gradient: what the report speaks of.
_CANDIDATES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)

Filter = Callable[[nn.Module, str], bool]


def to_dropit(
    model: nn.Module,
    strategy: str = "fastmink",
    gamma: float = 0.9,
    *,
    block_size: int | None = None,
    filter_fn: Filter | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Make the Linear and Conv2d layers of ``model`` keep only part of their input for the backward pass. In place.

    strategy: a name in ``dropit.STRATEGIES``. gamma: the fraction of the elements that is dropped, in [0, 1).
    block_size: elements in one block of "fastmink" (16384 if None). filter_fn(module, fqn): which layers to convert.
    seed: for "random", its own random numbers instead of PyTorch's.

    Parameters, hooks and state_dict keys stay as they are. Layers that are DropIT layers already get the new strategy.
    Returns the model. Raises ValueError where an argument is out of range or no layer could be converted.
    """
    chosen = make_strategy(strategy, gamma, block_size=block_size, seed=seed)
    targets = [
        module
        for fqn, module in model.named_modules()
        if _plain_type(module) in SWAPS and (filter_fn is None or filter_fn(module, fqn))
    ]
    if not targets:
        raise ValueError(_nothing_converted(model))
    for module in targets:
        module.__class__ = SWAPS[_plain_type(module)]  # type: ignore[assignment]
        module.strategy = chosen  # type: ignore[assignment]
    return model


def from_dropit(model: nn.Module) -> nn.Module:
    """Undo :func:`to_dropit`, in place. Returns the model."""
    for module in model.modules():
        if isinstance(module, DropITLayer):
            module.__class__ = module.plain  # type: ignore[assignment]
            del module.strategy
    return model


@dataclass(frozen=True)
class LayerCoverage:
    """One layer of the report. ``reason`` is empty where the layer is converted."""

    fqn: str
    type: str
    reason: str

    @property
    def status(self) -> str:
        """ "converted", or why not."""
        return self.reason or "converted"


class Coverage(list[LayerCoverage]):
    """The layers of a model that keep an input for a weight gradient, and whether DropIT packs it."""

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
        """One line: "converted 9 of 17"."""
        return f"converted {self.converted} of {len(self)}"


def coverage(model: nn.Module) -> Coverage:
    """Say of each layer that keeps an input for a weight gradient whether it is converted, or why not."""
    return Coverage(
        LayerCoverage(fqn, _plain_type(module).__name__, _reason(model, module, fqn))
        for fqn, module in _candidates(model)
    )


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((fqn, module) for fqn, module in model.named_modules() if isinstance(module, _CANDIDATES))


def _reason(model: nn.Module, module: nn.Module, fqn: str) -> str:
    if isinstance(module, DropITLayer):
        return ""
    if _inside_attention(model, fqn):
        return "not converted: nn.MultiheadAttention never calls it"
    if isinstance(module, nn.MultiheadAttention):
        return "not converted: its projections run inside one function"
    if type(module) in SWAPS:
        return "plain: left out, or to_dropit was not called"
    base = next((plain for plain in SWAPS if isinstance(module, plain)), None)
    if base is not None:
        return f"not converted: a subclass of {base.__name__} may compute something else"
    return "not converted: this type is not supported"


def _nothing_converted(model: nn.Module) -> str:
    rows = coverage(model)
    if not rows:
        return f"converted no layer: {type(model).__name__} has no Linear or Conv layer"
    counts = Counter((row.type, row.reason) for row in rows)
    listed = "; ".join(f"{kind} x{count}: {reason}" for (kind, reason), count in counts.items())
    return f"converted 0 of {len(rows)}: {listed}"


def _plain_type(module: nn.Module) -> type[nn.Module]:
    return module.plain if isinstance(module, DropITLayer) else type(module)


def _inside_attention(model: nn.Module, fqn: str) -> bool:
    parent = fqn.rpartition(".")[0]
    return bool(fqn) and isinstance(model.get_submodule(parent), nn.MultiheadAttention)
