"""Packed: a tensor of which only some elements are stored, and how its elements are numbered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Size, Tensor

OFFSET_BLOCK = 256  # elements whose place fits a byte
SCALE_GROUP = 32  # quantized values that share a scale
LEVELS_GROUP = 64  # values in 2 bits that share an offset and a scale


class Layout(NamedTuple):
    """The dense tensor's form. Its elements are numbered in memory order, so that packing copies nothing first."""

    shape: Size
    dtype: torch.dtype
    order: tuple[int, ...]  # dimensions, outermost in memory first; (0, 2, 3, 1) is channels_last
    channel_dim: int | None = None  # where whole channels are kept, instead of elements
    per_block: int | None = None  # where as many are kept of each whole block of 256 elements: how many

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        return math.prod(self.shape)


class Packed(NamedTuple):
    """What is kept of one tensor. One that is kept as it is has ``values`` that are the tensor itself, and no more.

    ``values``: (k,), in memory order, in the tensor's dtype or in a narrower one. Those in int8 have ``scales``,
    (ceil(k / 32), ) bfloat16, or an int16 encoding for float64: value i stands for
    ``values[i] * scales[i // 32]``, and the lowest that int8 has for NaN. In 2 bits four are in a byte, and ``scales``
    are the offset and the scale of each 64: (ceil(k / 64), 2).

    ``positions``: none where all is kept, or uint8 of the smaller of two encodings:

    - bits, (ceil(n / 8),): element 8 i + j of the dense tensor in bit j of byte i, set where the element is kept;
    - offsets, (2 b + k,): of each of the b = ceil(n / 256) blocks of 256 elements how many are kept (int16), then of
      each kept element its place in its block. Smaller where less than 1/8 - 1/128 of the elements is kept. Where the
      layout says how many are kept ``per_block``, the counts are left out: (k,).

    Where whole channels are kept, ``values`` has the tensor's shape but for k channels, and ``positions`` a bit
    per channel.
    """

    values: Tensor
    positions: Tensor | None
    scales: Tensor | None
    layout: Layout

    @property
    def is_dense(self) -> bool:
        """Whether the tensor was kept as it is."""
        return self.positions is None and self.values.dtype == self.layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, positions and scales."""
        return sum(part.nbytes for part in (self.values, self.positions, self.scales) if part is not None)


def keep_dense(x: Tensor) -> Packed:
    """Keep ``x`` whole, by reference; a later change in place is noticed by autograd, as for ``x`` itself."""
    return Packed(x.detach(), None, None, Layout(x.shape, x.dtype, tuple(range(x.dim()))))


def layout_of(x: Tensor) -> Layout:
    """The form of ``x``, which is dense in memory."""
    return Layout(x.shape, x.dtype, memory_order(x))


def is_dense_in_memory(x: Tensor) -> bool:
    """Whether ``x`` has neither gaps nor overlaps."""
    return x.is_contiguous() or x.permute(memory_order(x)).is_contiguous()


def repeats(layout: Layout, shape: Sequence[int]) -> int:
    """How many elements that follow each other in memory have the same one of a tensor of ``shape`` that broadcasts.

    0 where those do not follow each other in their own order, or it is broadcast to that.
    """
    dims = [dim for dim in layout.order if layout.shape[dim] > 1]
    missing = len(layout.shape) - len(shape)
    if missing < 0 or any(size not in (1, layout.shape[dim + missing]) for dim, size in enumerate(shape)):
        return 0
    own = [dim + missing for dim, size in enumerate(shape) if size > 1]
    if not own:
        return layout.numel
    place = dims.index(own[0])
    if dims[place : place + len(own)] != own:
        return 0
    return math.prod(layout.shape[dim] for dim in dims[place + len(own) :])


def index_in(x: Tensor, part: Tensor) -> tuple[int | slice, ...] | None:
    """Return the index that gives ``part``, a view of ``x``, which is contiguous; None if none does.

    Of integers, and slices without steps.
    """
    if not x.is_contiguous():
        return None
    index: list[int | slice] = []
    rest, dim = int(part.storage_offset()) - int(x.storage_offset()), 0
    for stride in x.stride():
        start, rest = divmod(rest, stride)
        if dim < part.dim() and part.stride(dim) == stride:
            index.append(slice(start, start + part.shape[dim]))
            dim += 1
        else:
            index.append(start)
    try:
        found = x.detach()[tuple(index)]
    except IndexError:
        return None
    form = (part.shape, part.stride(), part.storage_offset())
    return tuple(index) if (found.shape, found.stride(), found.storage_offset()) == form else None


def packed_nbytes(n: int, kept: int, dtype: torch.dtype, per_block: int | None = None) -> int:
    """Bytes that ``kept`` of ``n`` elements take when packed with values in ``dtype``."""
    return values_nbytes(kept, dtype) + (positions_nbytes(n, kept, per_block) if kept < n else 0)


def positions_nbytes(n: int, kept: int, per_block: int | None = None) -> int:
    """Bytes of the positions of ``kept`` of ``n`` elements, in the smaller encoding."""
    return min(bits_nbytes(n), offsets_nbytes(n, kept) if per_block is None else kept)


def channels_nbytes(x: Tensor, channel_dim: int, kept: int, dtype: torch.dtype) -> int:
    """Bytes that ``kept`` channels of ``x`` take when packed with values in ``dtype``."""
    channels = x.shape[channel_dim]
    return values_nbytes(x.numel() // channels * kept, dtype) + bits_nbytes(channels)


def values_nbytes(count: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` values stored in ``dtype``, with their scales."""
    scales = 2 * -(-count // SCALE_GROUP) if dtype is torch.int8 else 0
    return count * dtype.itemsize + scales


def narrower(dtype: torch.dtype, value_dtype: torch.dtype | None) -> torch.dtype:
    """Return what values of a tensor of ``dtype`` are stored in, given ``value_dtype``: never a wider type."""
    if value_dtype is None or value_dtype.itemsize >= dtype.itemsize:
        return dtype
    return value_dtype


def bits_nbytes(n: int) -> int:
    """Bytes of positions encoded as bits."""
    return -(-n // 8)


def offsets_nbytes(n: int, kept: int) -> int:
    """Bytes of positions encoded as offsets."""
    return 2 * -(-n // OFFSET_BLOCK) + kept


def dense_nbytes(x: Tensor) -> int:
    """Return the bytes of keeping ``x`` by reference: of an expanded tensor each distinct element counts once."""
    nbytes = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        nbytes *= size if stride else 1
    return nbytes


def flatten(x: Tensor, outermost: int | None = None) -> tuple[Tensor, Layout]:
    """``x`` as (n,) in memory order, a view wherever ``x`` has neither gaps nor overlaps, and how to undo it.

    With ``outermost``, that dimension comes first, whether it does in memory or not.
    """
    x = x.resolve_conj().resolve_neg()  # whose elements are their bits
    if outermost is not None:
        order = (outermost, *(dim for dim in memory_order(x) if dim != outermost))
        return x.permute(order).reshape(-1), Layout(x.shape, x.dtype, order)
    if _is_in_order(x):
        return x.reshape(-1), Layout(x.shape, x.dtype, tuple(range(x.dim())))
    if not is_dense_in_memory(x):
        x = x.clone()  # dense, with the dimensions in the same order in memory as before where they had one
    layout = layout_of(x)
    return x.permute(layout.order).reshape(-1), layout


def unflatten(flat: Tensor, layout: Layout) -> Tensor:
    """Undo :func:`flatten`: a view of ``flat`` (n,) with the tensor's shape and order in memory."""
    if layout.order == tuple(range(len(layout.order))):
        return flat.view(layout.shape)
    in_memory = flat.view([layout.shape[dim] for dim in layout.order])
    return in_memory.permute([layout.order.index(dim) for dim in range(len(layout.order))])


def _is_in_order(x: Tensor) -> bool:
    """Whether the dimensions are in memory as they are numbered, without gaps; of size 1 the strides may say others."""
    return x.is_contiguous() and 0 not in x.shape and 1 not in x.shape


def memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of ``x``, outermost in memory first."""
    if _is_in_order(x):
        return tuple(range(x.dim()))  # a compiler takes long to trace the rest
    strides = x.stride()
    order: list[int] = []
    # By insertion: a compiler can compare symbolic strides, but not sort them.
    for dim, stride in enumerate(strides):
        place = len(order)
        while place > 0 and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, dim)
    return tuple(order)
