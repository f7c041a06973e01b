"""The operations in plain PyTorch: the specification that any kernel has to agree with.

Times are ns per element of a float32 tensor of 4 M elements, torch 2.15 on two CPU cores, keeping one in ten.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Size, Tensor

from dropit.packed import (
    LEVELS_GROUP,
    OFFSET_BLOCK,
    SCALE_GROUP,
    Layout,
    Packed,
    bits_nbytes,
    is_dense_in_memory,
    narrower,
    positions_nbytes,
    unflatten,
)
from dropit.tracing import is_plain

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplying eight bytes of 0 or 1 by this gathers them, first byte lowest, in the product's top byte.
_GATHER_BITS = 0x0102040810204080
_HAS_STATIC_ON_GPU = torch._C._dispatch_has_kernel_for_dispatch_key("aten::nonzero_static", "CUDA")  # torch >= 2.7


def magnitude(x: Tensor) -> Tensor:
    """The magnitudes of a float tensor as integers of its width, in the same order: NaN above Inf above the rest.

    Bits without the sign compare as the floats do, tie exactly where |x| ties, and select faster (topk takes 6.1 ns of
    int32, 9.9 of float32).
    """
    integers = x.view(INTEGER_OF_SIZE[x.element_size()])
    return integers & torch.iinfo(integers.dtype).max


def topk_mask(score: Tensor, k: int) -> Tensor:
    """Mark the ``k`` largest of each row; of equal ones, those that come first.

    score: (rows, n) integers; 1 <= k <= n. Returns (rows, n) bool with exactly k set in each row.
    """
    # The k-th largest by topk: 6.1 ns; kthvalue takes 14.7, a stable sort 73.
    threshold = score.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)  # (rows, 1)
    mask = score >= threshold
    if score.is_meta:
        return mask  # of which only the shape is known
    if _can_look(score):
        # Looking costs 0.1 ns and saves the count below, 4 ns, from the rows that have no tie at the threshold.
        if mask.count_nonzero() > k * len(mask):
            tied = (mask.sum(dim=1) > k).nonzero().squeeze(1)
            mask[tied] = _first_of_equals(score[tied], threshold[tied], k)
        return mask
    return _first_of_equals(score, threshold, k)


def _first_of_equals(score: Tensor, threshold: Tensor, k: int) -> Tensor:
    above = score > threshold
    at = score == threshold
    missing = k - above.sum(dim=1, keepdim=True)
    return above | (at & (at.cumsum(dim=1) <= missing))


def largest_mask(rows: Tensor, block_size: int, count: int, rest_count: int) -> Tensor:
    """Mark the largest by magnitude, ``count`` of each ``block_size`` elements of a row, ``rest_count`` of the rest.

    rows: (r, n) floats. Returns (r, n) bool. Of equal magnitudes those that come first are marked.
    """
    score = magnitude(rows)
    whole = rows.shape[1] // block_size * block_size
    parts = []
    if whole:
        blocks = score[:, :whole].reshape(-1, block_size)
        parts.append(topk_mask(blocks, count).view(-1, whole))
    if whole < rows.shape[1]:
        parts.append(topk_mask(score[:, whole:], rest_count))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def pack_largest(
    flat: Tensor,
    block_size: int,
    count: int,
    rest_count: int,
    layout: Layout,
    value_dtype: torch.dtype | None = None,
) -> Packed:
    """Keep of ``flat`` (n,) what :func:`largest_mask` marks."""
    whole, rest = divmod(flat.numel(), block_size)
    mask = largest_mask(flat.unsqueeze(0), block_size, count, rest_count).squeeze(0)
    return pack(flat, mask, whole * count + (rest_count if rest else 0), layout, value_dtype)


def pack(
    flat: Tensor, mask: Tensor | None, count: int, layout: Layout, value_dtype: torch.dtype | None = None
) -> Packed:
    """Keep the ``count`` elements of ``flat`` (n,) that ``mask`` (n,) bool marks, or all where there is none.

    ``value_dtype``: what to store them in where it is narrower than their own dtype.
    """
    if mask is None:
        values, scales = narrow(flat, value_dtype)
        return Packed(values, None, scales, layout)
    n = flat.numel()
    kept = _nonzero(mask, count)
    if positions_nbytes(n, count, layout.per_block) == bits_nbytes(n):
        positions = pack_bits(mask)
    elif layout.per_block is not None:
        positions = (kept % OFFSET_BLOCK).to(torch.uint8)
    else:
        positions = _pack_offsets(mask, kept)
    values, scales = narrow(flat[kept], value_dtype)
    return Packed(values, positions, scales, layout)


def unpack(packed: Packed) -> Tensor:
    """The dense tensor: kept elements at their positions, zeros elsewhere; the order in memory is the original's."""
    if packed.is_dense:
        return packed.values
    if packed.positions is None:
        return unflatten(_widen_all(packed), packed.layout)
    if packed.layout.channel_dim is not None:
        kept, channels = unpack_channels(packed)
        dense = unflatten(kept.new_zeros(packed.layout.numel), packed.layout)
        return dense.index_copy_(packed.layout.channel_dim, channels, kept)
    values = widen(packed.values, packed.scales, packed.layout.dtype)
    n, count, per_block = packed.layout.numel, values.numel(), packed.layout.per_block
    dense = values.new_zeros(n)
    if packed.positions.numel() < bits_nbytes(n) and per_block is not None:
        _scatter_blocks(dense, packed.positions, values, per_block)  # 0.1 ns
    elif packed.positions.numel() < bits_nbytes(n):
        dense.scatter_(0, _unpack_offsets(packed.positions, n, count), values)  # 0.45 ns
    else:
        # 1.8 ns; index_put by the mask takes 2.8.
        dense.masked_scatter_(unpack_bits(packed.positions, n), values)
    return unflatten(dense, packed.layout)


def pack_channels(
    x: Tensor, mask: Tensor, count: int, layout: Layout, value_dtype: torch.dtype | None = None
) -> Packed:
    """Keep the ``count`` channels of ``x`` that ``mask`` (channels,) bool marks, as :func:`pack` keeps elements."""
    dim = layout.channel_dim
    assert dim is not None
    channels = _nonzero(mask, count)
    if dim == layout.order[-1] and is_dense_in_memory(x):  # as rows: ten times as fast
        kept = x.permute(layout.order).reshape(-1, x.shape[dim]).index_select(1, channels)
        shape = Size([count if each == dim else size for each, size in enumerate(x.shape)])
        values, scales = narrow(unflatten(kept.view(-1), layout._replace(shape=shape)), value_dtype)
    else:
        values, scales = narrow(x.index_select(dim, channels), value_dtype)
    return Packed(values, pack_bits(mask), scales, layout)


def unpack_channels(packed: Packed) -> tuple[Tensor, Tensor]:
    """Of what :func:`pack_channels` packed: the kept channels, of the tensor's shape but for them, and which they are.

    The latter (k,) int64.
    """
    dim = packed.layout.channel_dim
    assert dim is not None
    assert packed.positions is not None
    values = widen(packed.values, packed.scales, packed.layout.dtype)
    return values, _nonzero(unpack_bits(packed.positions, packed.layout.shape[dim]), values.shape[dim])


def _nonzero(mask: Tensor, count: int) -> Tensor:
    """Where (n,) bool is set: (count,) int64. 1.8 ns; indexing by the mask would look for it again."""
    # 3.0 ns, but a shape known beforehand, for which a GPU need not be waited for.
    if torch.compiler.is_compiling() or mask.is_meta or (mask.is_cuda and _HAS_STATIC_ON_GPU) or _is_fake(mask):
        return torch.nonzero_static(mask, size=count).squeeze(1)
    return mask.nonzero().squeeze(1)


def _is_fake(x: Tensor) -> bool:
    """Whether a mode or a class of tensors is in between, which may know shapes alone."""
    return type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _pack_offsets(mask: Tensor, kept: Tensor) -> Tensor:
    """Counts of each block of 256 as int16, then offsets: (2 b + k,) uint8."""
    counts = _padded(mask, OFFSET_BLOCK).view(-1, OFFSET_BLOCK).sum(dim=1, dtype=torch.int16)
    return torch.cat([counts.view(torch.uint8), (kept % OFFSET_BLOCK).to(torch.uint8)])


def _unpack_offsets(positions: Tensor, n: int, count: int) -> Tensor:
    """(2 b + k,) uint8 -> the kept elements' places, (k,) int64."""
    blocks = -(-n // OFFSET_BLOCK)
    counts = positions[: 2 * blocks].view(torch.int16).to(torch.int64)
    starts = torch.arange(0, blocks * OFFSET_BLOCK, OFFSET_BLOCK, device=positions.device)
    return starts.repeat_interleave(counts, output_size=count) + positions[2 * blocks :]


def _scatter_blocks(dense: Tensor, offsets: Tensor, values: Tensor, per_block: int) -> None:
    """Put ``per_block`` values (k,) in each block of 256 elements of ``dense`` (n,), and the others in the rest."""
    blocks = dense.numel() // OFFSET_BLOCK
    kept = blocks * per_block
    places = offsets.to(torch.int64)
    rows = dense[: blocks * OFFSET_BLOCK].view(blocks, OFFSET_BLOCK)
    rows.scatter_(1, places[:kept].view(blocks, per_block), values[:kept].view(blocks, per_block))
    dense[blocks * OFFSET_BLOCK :].scatter_(0, places[kept:], values[kept:])


def narrow(values: Tensor, value_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Values of any shape in ``value_dtype``, where that is narrower, and their scales, where they need any."""
    dtype = narrower(values.dtype, value_dtype)
    if dtype is torch.int8:
        return quantize(values)
    return values.to(dtype), None


def widen(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Undo :func:`narrow`, but for what was rounded."""
    return values.to(dtype) if scales is None else dequantize(values, scales, dtype, values.numel()).view(values.shape)


def _widen_all(packed: Packed) -> Tensor:
    """All elements of a tensor that was kept whole, but narrower: (n,)."""
    if packed.scales is None:
        return packed.values.to(packed.layout.dtype)
    return dequantize(packed.values, packed.scales, packed.layout.dtype, packed.layout.numel)


# By bits: the code of a group's largest element, and the largest code there is. A scale may have been rounded down by
# 0.4 %, which in 16 bits is many codes. The next code below the least is that of elements that are not finite.
CODES = {16: (32640, 32767), 8: (127, 127), 4: (7, 7)}
LLOYD = 2  # times that levels are fitted and codes chosen again; more lower the error by less than a hundredth
_UNUSED_BITS = 47  # of a double, where a scale keeps its exponent's 11 bits and the highest 5 of its fraction


def quantize(
    x: Tensor, bits: int = 8, noise: Tensor | None = None, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """Round each group of 32 elements, in the order of ``x.reshape(-1)``, to integer codes times the group's scale.

    ``bits``: 16 or 8, for 65,281 or 255 codes, returned as int16 or int8 of the shape of ``x``; or 4, for 15, two in a
    byte: (ceil(n / 2),) uint8. With them the scales, (ceil(n / 32),): bfloat16, or int16 that only :func:`dequantize`
    can read for float64, whose range is wider. The precision of a scale does not matter, as the elements are divided by
    what is stored: multiplied by its reciprocal, in float32 or for float64 in that. Two bits are another form:
    :func:`quantize_to_levels`.
    ``noise``: uniform in [0, 1), of the shape of ``x``, to round stochastically; without it, to the nearest.
    ``statistics``: quantize what ``x`` (n,) is after :func:`normalize`.

    An element that is not finite is ignored in its group's scale, has a reserved code and comes back as NaN. A finite
    one comes back finite. With L the largest finite magnitude of its group and c that one's code, it is off by no more
    than L / 2c, or by half the least normal number of float32 (of float64) where that is more; by 0.4 % (3.2 %) more
    than that for the rounding of the scale, and by what rounding to its dtype adds.
    """
    if statistics is not None:
        x = normalize(x, statistics)
    if bits == 2:
        return quantize_to_levels(x)
    n, (top, most) = x.numel(), CODES[bits]
    groups = _groups(x.reshape(-1)).to(torch.promote_types(x.dtype, torch.float32))
    largest, finite = _largest(groups), None
    # NaN and Inf stay in a sum. Looking costs 0.01 ns, and saves four passes.
    if not _can_look(x) or not math.isfinite(largest.sum().item()):
        finite = groups.isfinite()
        groups = groups.where(finite, 0)
        largest = _largest(groups)
    scales = _round_scales(largest / top)
    rounded = (groups * _widen_scales(scales).reciprocal().unsqueeze(1)).clamp_(-most, most)
    if noise is None:
        rounded.round_()
    else:
        rounded.add_(_groups(noise.reshape(-1))).floor_().clamp_(max=most)  # the sum may have been rounded up
    if finite is not None:
        rounded.masked_fill_(~finite, -most - 1)
    codes = rounded.view(-1)[:n].to(torch.int16 if bits == 16 else torch.int8)
    if bits != 4:
        return codes.view(x.shape), scales
    return pack_subbyte((codes + 8).view(torch.uint8), 16), scales


def quantize_to_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of 64 elements to the nearest of its four levels, offset + code * scale.

    Returns the codes, four in a byte: (ceil(n / 4),) uint8, and of each group offset and scale: (ceil(n / 64), 2)
    bfloat16, for float64 in that.

    The levels are those of the least squared error, found by Lloyd's algorithm from evenly spread ones: codes for
    levels, then levels for codes, three times. It takes the elements in 256 steps from the group's least to its
    largest, so that all sums are of integers, and no backend's order of adding matters.

    A finite element comes back within its group's range of where it was, and finite; a group with one that is not
    comes back as NaN.
    """
    n = x.numel()
    groups = _padded_by_last(x.reshape(-1), LEVELS_GROUP).view(-1, LEVELS_GROUP)
    groups = groups.to(torch.promote_types(x.dtype, torch.float32))
    stored = torch.bfloat16 if x.dtype is not torch.float64 else torch.float64
    tiny, limit = torch.finfo(groups.dtype).tiny, torch.finfo(stored).max
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    unit = (high / 255 - low / 255).clamp_(min=tiny)
    finite = None
    if not _can_look(x) or not math.isfinite(unit.sum().item()):
        finite = unit.isfinite()  # or an element is not
        groups, low, unit = groups.where(finite, 0), low.where(finite, 0), unit.where(finite, 1)
    steps = _steps_from(groups, low, unit).clamp_(0, 255)
    codes = (steps * (1 / 85)).round_()
    for _ in range(LLOYD):
        codes = _steps_from(steps, *_fit_levels(steps, codes)).clamp_(0, 3)
    level, apart = _fit_levels(steps, codes)
    offset = (low + level * unit).clamp_(-limit, limit)
    offset = offset.where(offset.abs() >= tiny, 0).to(stored)
    scale = (apart * unit).clamp_(tiny, limit).to(stored)
    codes = _steps_from(groups, offset.to(groups.dtype), scale.to(groups.dtype)).clamp_(0, 3)
    if finite is not None:
        offset = offset.where(finite, math.nan)
    packed = pack_subbyte(codes.to(torch.uint8).view(-1)[: -(-n // 4) * 4], 4)
    integer = INTEGER_OF_SIZE[stored.itemsize]  # of floats autocast would choose a common dtype
    return packed, torch.cat([offset.view(integer), scale.view(integer)], dim=1).view(stored)


def _fit_levels(steps: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The level of code 0 and the distance to the next, of the least squared error: a line through (code, step).

    steps: (groups, 64) integers in [0, 255], as floats; codes: alike, in [0, 3]. Returns two (groups, 1) floats. All
    sums and products are of integers below 2^24, which float32 holds exactly.
    """
    c, u = codes.sum(dim=1, keepdim=True), steps.sum(dim=1, keepdim=True)
    cc, cu = (codes * codes).sum(dim=1, keepdim=True), (codes * steps).sum(dim=1, keepdim=True)
    spread = (LEVELS_GROUP * cc - c * c).clamp_(min=1)  # 0 where all codes are alike
    return (u * cc - cu * c) / spread, ((LEVELS_GROUP * cu - c * u) / spread).clamp_(min=1)


def _steps_from(x: Tensor, origin: Tensor, step: Tensor) -> Tensor:
    """How many steps ``x`` is from the origin, to the nearest. In halves, whose difference is finite."""
    steps: Tensor = ((x * 0.5 - origin * 0.5) * (step * 0.5).reciprocal()).round_()
    return steps


class Statistics(NamedTuple):
    """What ``x`` (n,) is normalized by: element i by those at place ``i // inner % len(rstd)``."""

    mean: Tensor | None
    rstd: Tensor  # 1 / deviation
    inner: int


def normalize(x: Tensor, statistics: Statistics) -> Tensor:
    """(x - mean) / deviation, computed in the wider of both dtypes."""
    mean, rstd, inner = statistics
    rows = x.view(-1, rstd.numel(), inner)
    centered = rows if mean is None else rows - mean.reshape(-1, 1)
    return (centered * rstd.reshape(-1, 1)).view(-1)


class Rescaling(NamedTuple):
    """x * weight + bias of (n,), then bounded by ``lower`` and ``upper``, then in ``dtype``.

    Element i has the weight and the bias, one of them or both, at place ``i // inner % len(weight)``. ``dtype``: where
    it is narrower than what their product has.
    """

    weight: Tensor | None
    bias: Tensor | None
    inner: int
    lower: float = -math.inf
    upper: float = math.inf
    dtype: torch.dtype | None = None

    def result_type(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the result for elements of ``dtype``."""
        if self.dtype is not None:
            return self.dtype
        given = (each.dtype for each in (self.weight, self.bias) if each is not None)
        return functools.reduce(torch.promote_types, given, dtype)


def rescale(x: Tensor, by: Rescaling, result: torch.dtype) -> Tensor:
    """Apply ``by`` to ``x`` (n,), whose dtype it is computed in, and whose memory it may use: in dtype ``result``."""
    weight, bias = (None if each is None else each.to(x.dtype).reshape(-1, 1) for each in (by.weight, by.bias))
    given = weight if bias is None else bias
    assert given is not None
    rows, in_place = x.view(-1, given.numel(), by.inner), _can_look(x)
    # Apart: addcmul rounds once or twice, as it was compiled.
    if weight is not None:
        rows = rows.mul_(weight) if in_place else rows * weight
    if bias is not None:
        rows = rows.add_(bias) if in_place else rows + bias
    if by.lower > -math.inf or by.upper < math.inf:
        rows = rows.clamp_(by.lower, by.upper)
    return rows.view(-1).to(result)


def computed_in(dtype: torch.dtype, by: Rescaling) -> torch.dtype:
    """Return the dtype that elements of ``dtype`` are rescaled in: float32, or what is wider."""
    return torch.promote_types(by.result_type(dtype), torch.promote_types(dtype, torch.float32))


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int, rescaling: Rescaling | None = None) -> Tensor:
    """Undo :func:`quantize`, but for what was rounded: (n,) of ``dtype``, to which the products are rounded once.

    ``rescaling``: what is done with it before it is rounded; the result has the dtype that this gives.
    """
    if rescaling is not None:
        dense = dequantize(codes, scales, computed_in(dtype, rescaling), n)
        return rescale(dense, rescaling, rescaling.result_type(dtype))
    if n == 0:
        return scales.new_empty(0, dtype=dtype)
    if scales.dim() == 2:
        return _levels(codes, scales, dtype, n)
    if codes.dtype is torch.uint8:
        codes, most = unpack_subbyte(codes, 16, n).view(torch.int8) - 8, CODES[4][1]
    else:
        most = torch.iinfo(codes.dtype).max
    groups, wide = _groups(codes.reshape(-1)), _widen_scales(scales)
    limit, looks = torch.finfo(dtype).max, _can_look(codes)
    # Numbers of eight bits: bfloat16 holds both, and rounds their product as float32 and a conversion would.
    exact = dtype is torch.bfloat16 and codes.dtype is torch.int8
    dense = groups * (scales if exact else wide).unsqueeze(1)
    if not looks or wide.amax().item() * most > limit:  # the scale may have been rounded up
        dense = dense.clamp_(-limit, limit)
    dense = dense.to(dtype)
    if not looks or groups.amin().item() < -most:  # 0.03 ns
        dense = dense.masked_fill_(groups < -most, math.nan)
    return dense.view(-1)[:n]


def _levels(codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    """Undo :func:`quantize_to_levels`, but for what was rounded: (n,) of ``dtype``."""
    numbers = _padded(unpack_subbyte(codes, 4, 4 * codes.numel()), LEVELS_GROUP).view(-1, LEVELS_GROUP)
    # In eighths, whose products and sums are finite.
    offset, scale = (scales.to(torch.promote_types(scales.dtype, torch.float32)) * 0.125).split(1, dim=1)
    limit = torch.finfo(dtype).max * 0.125
    dense: Tensor = (offset + numbers * scale).clamp_(-limit, limit).mul_(8).to(dtype)
    return dense.view(-1)[:n]


def _can_look(x: Tensor) -> bool:
    """Whether elements can be read without a synchronization or a graph break."""
    return x.device.type == "cpu" and is_plain(x)


def _groups(flat: Tensor) -> Tensor:
    """(n,) -> (ceil(n / 32), 32), the last one filled with zeros."""
    return _padded(flat, SCALE_GROUP).view(-1, SCALE_GROUP)


def _largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each: 0.1 ns, of the absolute values 0.3."""
    return torch.maximum(groups.amax(dim=1), -groups.amin(dim=1))


def _round_scales(scales: Tensor) -> Tensor:
    """To 16 bits each, and no less than the least normal number, whose reciprocal is finite."""
    if scales.dtype is not torch.float64:
        return scales.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    integers: Tensor = scales.clamp(min=torch.finfo(torch.float64).tiny).view(torch.int64) + (2**_UNUSED_BITS - 1)
    return integers.bitwise_right_shift(_UNUSED_BITS).to(torch.int16)  # rounded up, as there is no code to spare


def _widen_scales(scales: Tensor) -> Tensor:
    """Undo :func:`_round_scales`, but for what was rounded."""
    if scales.dtype is not torch.int16:
        return scales.to(torch.float32)
    return (scales.to(torch.int64) & 0xFFFF).bitwise_left_shift(_UNUSED_BITS).view(torch.float64)


def _padded_by_last(flat: Tensor, multiple: int) -> Tensor:
    """(n,) with its last element up to a multiple, which widens no group's range."""
    missing = -flat.numel() % multiple
    return torch.cat([flat, flat[-1:].expand(missing)]) if missing and flat.numel() else flat


def _padded(flat: Tensor, multiple: int) -> Tensor:
    """(n,) with zeros up to a multiple; itself if it has that length."""
    missing = -flat.numel() % multiple
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def pack_bits(mask: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8. By multiplication: 0.07 ns."""
    return ((_padded(mask, 8).view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """(ceil(n / 8),) uint8 -> (n,) bool."""
    return unpack_subbyte(bits, 2, n).to(torch.bool)


@functools.cache
def rounded(bound: float, dtype: torch.dtype) -> float:
    """As PyTorch rounds the bounds that it clamps to or compares with."""
    return torch.tensor(bound, dtype=dtype, device="cpu").item()


def range_bitmask(flat: Tensor, lower: float, upper: float) -> Tensor:
    """Bits of where ``flat`` (n,) is neither at or below ``lower`` nor at or above ``upper``, as NaN is not."""
    outside = flat <= lower
    if upper < math.inf:
        outside |= flat >= upper
    return pack_bits(~outside)


def apply_bitmask(flat: Tensor, bits: Tensor) -> Tensor:
    """``flat`` (n,) where the bits are set, zeros elsewhere."""
    return torch.where(unpack_bits(bits, flat.numel()), flat, 0)


def pack_subbyte(numbers: Tensor, limit: int) -> Tensor:
    """(n,) uint8 below ``limit`` -> uint8, several in a byte where 1, 2 or 4 bits hold each; lowest bits first."""
    bits = _bits_for(limit)
    padded = _padded(numbers, 8 // bits)
    if bits == 4:  # 0.07 ns, by the other way 1.8
        pairs = padded.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if bits == 2:
        fours = padded.view(torch.int32)
        return (fours | (fours >> 6) | (fours >> 12) | (fours >> 18)).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    return (padded.view(-1, 8 // bits) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_subbyte(stored: Tensor, limit: int, n: int) -> Tensor:
    """Undo :func:`pack_subbyte`: (n,) uint8."""
    bits = _bits_for(limit)
    if bits == 4 and not torch.compiler.is_compiling():  # 0.1 ns, by the other way 0.5; a graph would save it widened
        wide = stored.to(torch.int16)
        return ((wide | (wide << 4)) & 0x0F0F).view(torch.uint8)[:n]
    if bits == 2 and not torch.compiler.is_compiling():
        four = stored.to(torch.int32)
        return ((four | (four << 6) | (four << 12) | (four << 18)) & 0x03030303).view(torch.uint8)[:n]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    numbers: Tensor = (stored.unsqueeze(1) >> shifts) & (2**bits - 1)
    return numbers.view(-1)[:n]


def _bits_for(limit: int) -> int:
    """The fewest of 1, 2, 4 and 8 bits that hold the numbers below ``limit``."""
    return next(bits for bits in (1, 2, 4, 8) if limit <= 2**bits)
