"""Saved: the tensors that a layer saves for backward, and the recipe that computes a dense tensor from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import Layout, Packed
from dropit.tracing import is_mapped, is_traced


class _Step(NamedTuple):
    """``function(x, *tensors)`` of the tensor x so far, or ``function(*tensors)`` in the first step."""

    name: str  # "" for what is not to be shown
    function: Callable[..., Tensor]
    tensors: int  # how many of the saved tensors it takes
    in_place: Callable[..., Tensor] | None = None  # the same, which may change x
    is_new: bool = True  # whether x is in memory of its own after the first step


class Recipe(NamedTuple):
    """How to compute a dense tensor from saved ones; holds none of them, so that a node of the graph may keep it."""

    steps: tuple[_Step, ...]

    def restore(self, *tensors: Tensor | None) -> Tensor:
        """Compute the dense tensor, or close to it, from all saved tensors in order."""
        first, *others = self.steps
        x, taken = first.function(*tensors[: first.tensors]), first.tensors
        may_change = first.is_new and not torch.is_grad_enabled() and not is_traced() and not is_mapped(x)
        for step in others:
            function = step.in_place if may_change and step.in_place is not None else step.function
            x = function(x, *tensors[taken : taken + step.tensors])
            taken += step.tensors
        return x

    def __repr__(self) -> str:
        return " -> ".join(step.name for step in self.steps if step.name)


class Saved(NamedTuple):
    """``recipe.restore(*tensors)`` is the dense tensor, or close to it. ``tensors`` are what autograd is to save."""

    recipe: Recipe
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, packed: Packed, name: str = "input") -> Saved:
        """Return what is saved of a packed tensor, which ``name`` stands for in the recipe."""
        unpack = partial(_unpack, packed.layout)
        step = _Step(f"{_encoding(packed)} {name}", unpack, 3, is_new=not packed.is_dense)
        return cls(Recipe((step,)), (packed.values, packed.positions, packed.scales))

    def map(
        self,
        name: str,
        function: Callable[..., Tensor],
        *tensors: Tensor | None,
        in_place: Callable[..., Tensor] | None = None,
    ) -> Saved:
        """Return what gives ``function(x, *tensors)`` of the dense tensor x.

        ``in_place``: the same function, that may use the memory of x, which on a CPU is faster than new memory.
        """
        steps = (*self.recipe.steps, _Step(name, function, len(tensors), in_place))
        return Saved(Recipe(steps), (*self.tensors, *tensors))

    def combine(self, name: str, function: Callable[[Tensor, Tensor], Tensor], other: Saved) -> Saved:
        """Return what gives ``function(x, y)`` of the dense tensors x and y; ``other`` restores y."""
        return self.map(name, partial(_combined, function, other.recipe), *other.tensors)

    def cast(self, dtype: torch.dtype) -> Saved:
        """Return what gives the dense tensor in ``dtype``."""
        return self.map(str(dtype).removeprefix("torch."), partial(cast, dtype))

    def restore(self) -> Tensor:
        """Compute the dense tensor, or close to it."""
        return self.recipe.restore(*self.tensors)

    def __repr__(self) -> str:
        return repr(self.recipe)


def _encoding(packed: Packed) -> str:
    if packed.is_dense:
        return "dense"
    if packed.positions is not None:
        return "packed"
    if packed.scales is not None and packed.scales.dim() == 2:
        return "int2"
    return {torch.int16: "int16", torch.int8: "int8", torch.uint8: "int4"}.get(packed.values.dtype, "narrowed")


def _unpack(layout: Layout, values: Tensor, positions: Tensor | None, scales: Tensor | None) -> Tensor:
    return ops.unpack(Packed(values, positions, scales, layout))


def _combined(
    function: Callable[[Tensor, Tensor], Tensor], recipe: Recipe, x: Tensor, *tensors: Tensor | None
) -> Tensor:
    return function(x, recipe.restore(*tensors))


def cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return ``x`` in ``dtype``."""
    return x.to(dtype)
