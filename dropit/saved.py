"""Saved: the tensors that a layer saves for backward, and the recipe that computes a dense tensor from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import Layout, Packed, keep_dense
from dropit.tracing import is_mapped, is_traced


class _Step(NamedTuple):
    """``function(x, *tensors)`` of the tensor x so far, or ``function(*tensors)`` in the first step."""

    name: str  # "" for what is not to be shown
    function: Callable[..., Tensor]
    tensors: int  # how many of the saved tensors it takes
    in_place: Callable[..., Tensor] | None = None  # the same, which may change x
    is_new: bool = True  # whether x is in memory of its own after the first step
    operand: Recipe | None = None  # what computes of the step's tensors the one that the function takes


class Recipe(NamedTuple):
    """How to compute a dense tensor from saved ones; holds none of them, so that a node of the graph may keep it.

    ``pointwise``: whether it computes each element exactly, from those at its place in tensors that are saved as they
    are and may be broadcast. ``channels``: of a tensor of which whole channels were kept, its layout.
    """

    steps: tuple[_Step, ...]
    pointwise: bool = False
    channels: Layout | None = None

    def restore(self, *tensors: Tensor | None) -> Tensor:
        """Compute the dense tensor, or close to it, from all saved tensors in order."""
        first, *others = self.steps
        x, taken = first.function(*tensors[: first.tensors]), first.tensors
        may_change = first.is_new and not torch.is_grad_enabled() and not is_traced() and not is_mapped(x)
        for step in others:
            function = step.in_place if may_change and step.in_place is not None else step.function
            given = tensors[taken : taken + step.tensors]
            x = function(x, *given) if step.operand is None else function(x, step.operand.restore(*given))
            taken += step.tensors
        return x

    def restore_channels(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the kept channels alone, where there are such: :func:`dropit.ops.unpack_channels`."""
        values, positions, scales = tensors
        assert self.channels is not None
        assert values is not None
        return ops.unpack_channels(Packed(values, positions, scales, self.channels))

    def part(self, index: tuple[int | slice, ...]) -> Recipe:
        """Return what computes ``x[index]`` alone, and no other element of x; only of one that is ``pointwise``."""
        assert self.pointwise
        first, *others = self.steps
        first = first._replace(function=partial(_part_of, index, first.function))
        steps = (step._replace(operand=step.operand and step.operand.part(index)) for step in others)
        return self._replace(steps=(first, *steps))

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
        channels = None if packed.is_dense or packed.layout.channel_dim is None else packed.layout
        return cls(Recipe((step,), channels=channels), (packed.values, packed.positions, packed.scales))

    @classmethod
    def exactly(cls, x: Tensor) -> Saved:
        """Return what is saved of a tensor that is kept as it is."""
        recipe, tensors = cls.of(keep_dense(x))
        return cls(recipe._replace(pointwise=True), tensors)

    def map(
        self,
        name: str,
        function: Callable[..., Tensor],
        *tensors: Tensor | None,
        in_place: Callable[..., Tensor] | None = None,
        pointwise: bool = False,
    ) -> Saved:
        """Return what gives ``function(x, *tensors)`` of the dense tensor x.

        ``in_place``: the same function, that may use the memory of x, which on a CPU is faster than new memory.
        ``pointwise``: whether it takes x alone, element by element.
        """
        steps = (*self.recipe.steps, _Step(name, function, len(tensors), in_place))
        return Saved(Recipe(steps, self.recipe.pointwise and pointwise), (*self.tensors, *tensors))

    def combine(
        self, name: str, function: Callable[[Tensor, Tensor], Tensor], other: Saved, *, pointwise: bool = False
    ) -> Saved:
        """Return what gives ``function(x, y)`` of the dense tensors x and y; ``other`` restores y.

        ``pointwise``: whether it is one of elements, that broadcasts.
        """
        steps = (*self.recipe.steps, _Step(name, function, len(other.tensors), operand=other.recipe))
        pointwise = pointwise and self.recipe.pointwise and other.recipe.pointwise
        return Saved(Recipe(steps, pointwise), (*self.tensors, *other.tensors))

    def part(self, index: tuple[int | slice, ...]) -> Saved:
        """Return what gives ``x[index]`` of the dense tensor x: :meth:`Recipe.part`."""
        return self._replace(recipe=self.recipe.part(index))

    def cast(self, dtype: torch.dtype) -> Saved:
        """Return what gives the dense tensor in ``dtype``."""
        return self.map(str(dtype).removeprefix("torch."), partial(cast, dtype), pointwise=True)

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


def _part_of(index: tuple[int | slice, ...], function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``x[index]`` of what x is broadcast to, which the index is one of."""
    x = function(*tensors)
    own = zip(index[len(index) - x.dim() :], x.shape, strict=True)
    return x[tuple(place if size > 1 else 0 if isinstance(place, int) else slice(None) for place, size in own)]


def cast(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return ``x`` in ``dtype``."""
    return x.to(dtype)
