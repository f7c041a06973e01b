"""Saved: the tensors that a layer saves for backward, and the recipe that computes a dense tensor from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dropit import ops
from dropit.ops import Rescaling
from dropit.packed import Layout, Packed, keep_dense, repeats, unflatten
from dropit.tracing import is_mapped, is_traced


class _Step(NamedTuple):
    """``function(x, *tensors)`` of the tensor x so far, or ``function(*tensors)`` in the first step."""

    name: str  # "" for what is not to be shown
    function: Callable[..., Tensor]
    tensors: int  # how many of the saved tensors it takes
    in_place: Callable[..., Tensor] | None = None  # the same, which may change x
    is_new: bool = True  # whether x is in memory of its own after the first step
    operand: Recipe | None = None  # what computes of the step's tensors the one that the function takes
    codes: Layout | None = None  # of a first step that dequantizes: the form of the dense tensor
    rescaling: Rescaling | None = None  # which that does as well, but for the tensors in it


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
        codes = packed.layout if packed.positions is None and packed.scales is not None else None
        step = _Step(f"{_encoding(packed)} {name}", unpack, 3, is_new=not packed.is_dense, codes=codes)
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

    def affine(self, weight: Tensor | None, bias: Tensor | None) -> Saved:
        """Return what gives x * weight + bias of the dense tensor x, to which both broadcast; None is 1 or 0."""
        given = weight if bias is None else bias
        first = self.recipe.steps[0]
        if given is None:
            return self
        if len(self.recipe.steps) == 1 and first.codes is not None and first.rescaling is None and not is_traced():
            inner = repeats(first.codes, given.shape)
            if inner and all(each is None or each.shape == given.shape for each in (weight, bias)):
                tensors = (None if each is None else each.reshape(-1).contiguous() for each in (weight, bias))
                step = _rescaling_step("affine", first, Rescaling(None, None, inner))
                return Saved(Recipe((step,)), (*self.tensors, *tensors))
        return self.map("affine", partial(_affine, False), weight, bias, in_place=partial(_affine, True))

    def clamp(self, name: str, lower: float, upper: float) -> Saved:
        """Return what gives the dense tensor between the bounds."""
        by = self._rescaling()
        if by is not None and (by.lower, by.upper) == (-math.inf, math.inf):
            return self._rescaled(name, by._replace(lower=lower, upper=upper))
        clamp, in_place = (partial(each, min=lower, max=upper) for each in (torch.clamp, torch.clamp_))
        return self.map(name, clamp, in_place=in_place)

    def cast(self, dtype: torch.dtype) -> Saved:
        """Return what gives the dense tensor in ``dtype``."""
        by = self._rescaling()
        if by is None:
            return self.map("", partial(cast, dtype), pointwise=True)
        codes = self.recipe.steps[0].codes
        assert codes is not None
        found = by._replace(weight=self.tensors[-2], bias=self.tensors[-1]).result_type(codes.dtype)
        if found is dtype:
            return self
        if by.dtype is not None or dtype.itemsize >= found.itemsize:  # which would be rounded once, not twice
            return self.map("", partial(cast, dtype), pointwise=True)
        return self._rescaled("", by._replace(dtype=dtype))

    def _rescaling(self) -> Rescaling | None:
        """Return how the only step rescales what it dequantizes, if it does."""
        first, *others = self.recipe.steps
        return None if others else first.rescaling

    def _rescaled(self, name: str, by: Rescaling) -> Saved:
        return self._replace(recipe=Recipe((_rescaling_step(name, self.recipe.steps[0], by),)))

    def restore(self) -> Tensor:
        """Compute the dense tensor, or close to it."""
        return self.recipe.restore(*self.tensors)

    def __repr__(self) -> str:
        return repr(self.recipe)


def _rescaling_step(name: str, first: _Step, by: Rescaling) -> _Step:
    """The step ``first``, which dequantizes, and in the same pass rescales: with two more tensors, weight and bias."""
    assert first.codes is not None
    function = partial(_unpack_rescaled, first.codes, by)
    name = f"{first.name} -> {name}" if name else first.name
    return first._replace(name=name, function=function, tensors=5, rescaling=by)


def _unpack_rescaled(
    layout: Layout,
    by: Rescaling,
    codes: Tensor,
    _: None,
    scales: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    by = by._replace(weight=weight, bias=bias)
    dense = ops.dequantize(codes, scales, layout.dtype, layout.numel, by)
    return unflatten(dense, layout)


def _affine(in_place: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias; ``in_place``: in the memory of ``x``, where it has the dtype."""
    of_dtype = all(each is None or each.dtype is x.dtype for each in (weight, bias))
    out = x if in_place and of_dtype else None
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight, out=out)
    if weight is not None:
        return torch.mul(x, weight, out=out)
    return x if bias is None else torch.add(x, bias, out=out)


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
