"""The operations as Triton kernels: the same results as ``reference``, for tensors on a GPU.

They agree bit for bit, but for what is rescaled: there the product and the sum are rounded once.

Each reads its input once and writes its output once; no sort, and nothing in between goes through memory. Imported
when a tensor on a GPU asks for it. ``TRITON_INTERPRET=1`` runs the kernels on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dropit.ops import reference
from dropit.packed import (
    LEVELS_GROUP,
    OFFSET_BLOCK,
    SCALE_GROUP,
    Layout,
    Packed,
    bits_nbytes,
    positions_nbytes,
    unflatten,
)
from dropit.tracing import is_plain

_BLOCK = tl.constexpr(OFFSET_BLOCK)
_GROUP = tl.constexpr(SCALE_GROUP)
_LEVELS = tl.constexpr(LEVELS_GROUP)


@triton.jit
def _pack_blocks(
    source, values, positions, n, k, rest_k, nbytes, BITS: tl.constexpr, IN_BITS: tl.constexpr, ROWS: tl.constexpr
):
    """Of each block of 256 integers, the bits of floats: the ``k`` largest magnitudes and where they are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _BLOCK)
    at = rows.to(tl.int64)[:, None] * _BLOCK + columns[None, :]
    x = tl.load(source + at, mask=at < n, other=0)
    wide = x.to(tl.int64) if BITS == 64 else x.to(tl.int32)
    score = tl.where(at < n, wide & ((1 << (BITS - 1)) - 1), -1)
    here = tl.where((rows.to(tl.int64) + 1) * _BLOCK <= n, k, rest_k)
    # The k-th largest, from its highest bit to its lowest, or until as many as are wanted are not below.
    threshold = tl.zeros((ROWS,), wide.dtype)
    step = tl.full((), 1, wide.dtype) << (BITS - 2)
    exact = tl.zeros((ROWS,), tl.int32)
    open_rows = tl.full((), 1, tl.int32)
    while (step > 0) & (open_rows > 0):
        higher = threshold | step
        count = tl.sum((score >= higher[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(count >= here, higher, threshold)
        exact = tl.where(count == here, 1, exact)
        open_rows = ROWS - tl.sum(exact, axis=0)
        step = step >> 1
    kept = score >= threshold[:, None]
    if open_rows > 0:  # some are equal: those that come first
        above = score > threshold[:, None]
        tied = score == threshold[:, None]
        missing = here - tl.sum(above.to(tl.int32), axis=1)
        kept = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= missing[:, None]))
    place = rows.to(tl.int64)[:, None] * k + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(values + place, x, mask=kept)
    if IN_BITS:
        weights = (kept.to(tl.int32) << (columns % 8)[None, :]).reshape(ROWS, _BLOCK // 8, 8)
        byte = rows.to(tl.int64)[:, None] * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
        tl.store(positions + byte, tl.sum(weights, axis=2).to(tl.uint8), mask=byte < nbytes)
    else:
        tl.store(positions + place, tl.broadcast_to(columns[None, :], (ROWS, _BLOCK)).to(tl.uint8), mask=kept)


@triton.jit
def _load_bits(bits, rows, nbytes, ROWS: tl.constexpr):
    """Which elements of blocks of 256 are marked."""
    byte = rows.to(tl.int64)[:, None] * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
    loaded = tl.load(bits + byte, mask=byte < nbytes, other=0).to(tl.int32)
    return ((loaded[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1).reshape(ROWS, _BLOCK) != 0


@triton.jit
def _unpack_blocks(
    values,
    positions,
    starts,
    dense,
    n,
    nbytes,
    k,
    COUNTED: tl.constexpr,
    IN_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Blocks of 256 elements, zeros but for those kept: ``k`` of each or, where COUNTED, from one start to the next.

    WIDTH: no fewer than any block has, a power of two.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _BLOCK)
    at = rows.to(tl.int64)[:, None] * _BLOCK + columns[None, :]
    inside = at < n
    if COUNTED:
        first = tl.load(starts + rows, mask=rows.to(tl.int64) * _BLOCK < n, other=0)
        last = tl.load(starts + rows + 1, mask=rows.to(tl.int64) * _BLOCK < n, other=0)
    else:
        first = rows.to(tl.int64) * k
        last = tl.minimum(first + k, tl.load(starts))  # how many there are in all
    if IN_BITS:
        kept = _load_bits(positions, rows, nbytes, ROWS)
        place = first[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
        tl.store(dense + at, tl.load(values + place, mask=kept, other=0), mask=inside)
    else:
        tl.store(dense + at, tl.zeros((ROWS, _BLOCK), values.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        place = first[:, None] + tl.arange(0, WIDTH)[None, :]
        kept = place < last[:, None]
        offset = tl.load(positions + place, mask=kept, other=0).to(tl.int64)
        here = rows.to(tl.int64)[:, None] * _BLOCK + offset
        tl.store(dense + here, tl.load(values + place, mask=kept, other=0), mask=kept)


@triton.jit
def _to_bfloat16(x, COMPUTED: tl.constexpr = False):
    """Rounded to the nearest, as PyTorch does: what casting alone does differs between backends.

    COMPUTED: whether ``x`` may be a NaN of any bits, as arithmetic returns it, which would be rounded to a number.
    """
    whole = x.to(tl.int32, bitcast=True)
    bits = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    if COMPUTED:
        bits = tl.where((whole & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, bits)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _load_normalized(
    source, mean, rstd, first, at, n, inner, sections, CENTERED: tl.constexpr, NORMALIZED: tl.constexpr
):
    """The elements of each row at ``at``, as floats of at least 32 bits; zeros from ``n`` on.

    NORMALIZED: by statistics that are of the row as a whole, which starts at ``first`` (1), or of each element (2).
    """
    x = tl.load(source + at, mask=at < n, other=0)
    wide = x.to(tl.float64) if source.dtype.element_ty == tl.float64 else x.to(tl.float32)
    if NORMALIZED == 1:
        which = (first // inner % sections)[:, None]
    elif NORMALIZED == 2:
        which = at.to(tl.int32) // inner % sections
    if NORMALIZED:
        if CENTERED:
            wide = wide - tl.load(mean + which).to(wide.dtype)
        wide = wide * tl.load(rstd + which).to(wide.dtype)
    return wide


@triton.jit
def _round(x):
    """To the nearest, of two equally near to the even one: what this adds leaves no bits for a fraction."""
    shift = 6755399441055744.0 if x.dtype == tl.float64 else 12582912.0
    return (x + shift) - shift


@triton.jit
def _quantize_groups(
    source,
    mean,
    rstd,
    codes,
    scales,
    n,
    nbytes,
    inner,
    sections,
    noise,
    top,
    most,
    NOISY: tl.constexpr,
    CENTERED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Groups of 32 elements as multiples of a scale."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows.to(tl.int64)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    wide = _load_normalized(source, mean, rstd, rows * _GROUP, at, n, inner, sections, CENTERED, NORMALIZED)
    finite = (tl.abs(wide) < float("inf")) & (at < n)
    wide = tl.where(finite, wide, 0)
    largest = tl.max(tl.abs(wide), axis=1)
    one = tl.full((ROWS,), 1, wide.dtype)
    if source.dtype.element_ty == tl.float64:
        scale = (tl.maximum(largest / top, 2.2250738585072014e-308).to(tl.int64, bitcast=True) + 0x7FFFFFFFFFFF) >> 47
        tl.store(scales + rows, scale.to(tl.int16), mask=rows.to(tl.int64) * _GROUP < n)
        reciprocal = one / (scale << 47).to(tl.float64, bitcast=True)
    else:
        scale = _to_bfloat16(tl.maximum(tl.div_rn(largest, one * top), 1.1754943508222875e-38))
        tl.store(scales + rows, scale, mask=rows.to(tl.int64) * _GROUP < n)
        reciprocal = tl.div_rn(one, scale.to(tl.float32))
    # What bounds the product also keeps a compiler from adding to it before it is rounded.
    code = tl.minimum(tl.maximum(wide * reciprocal[:, None], -most), most)
    if NOISY:
        code = tl.floor(code + tl.load(noise + at, mask=at < n, other=0).to(wide.dtype))
        code = tl.minimum(code, most)
    else:
        code = _round(code)
    whole = tl.where(finite, code, -most - 1).to(tl.int32)
    if BITS != 4:
        tl.store(codes + at, whole.to(codes.dtype.element_ty), mask=at < n)
    else:
        pairs = tl.where(at < n, whole + 8, 0).reshape(ROWS, _GROUP // 2, 2)
        shifts = tl.arange(0, 2)[None, None, :] * 4
        byte = rows.to(tl.int64)[:, None] * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, :]
        tl.store(codes + byte, tl.sum(pairs << shifts, axis=2).to(tl.uint8), mask=byte < nbytes)


@triton.jit
def _divide(a, b):
    """Rounded to the nearest, as PyTorch does; a division in float32 alone is compiled to a faster one."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _steps_from(x, origin, step, most):
    """How many steps each row of ``x`` is from its origin, to the nearest, from 0 to ``most``."""
    one = tl.full(step.shape, 1, step.dtype)
    steps = (x * 0.5 - (origin * 0.5)[:, None]) * _divide(one, step * 0.5)[:, None]
    # What bounds the product also keeps a compiler from adding to it before it is rounded.
    return _round(tl.minimum(tl.maximum(steps, 0.0), most))


@triton.jit
def _fit_levels(steps, codes, KIND: tl.constexpr):
    """The level of code 0 and the distance to the next, of the least squared error; integers add up exactly."""
    c = tl.sum(codes, axis=1)
    u = tl.sum(steps, axis=1)
    cc = tl.sum(codes * codes, axis=1)
    cu = tl.sum(codes * steps, axis=1)
    spread = tl.maximum(cc * _LEVELS - c * c, 1).to(KIND)
    apart = _divide((cu * _LEVELS - c * u).to(KIND), spread)
    return _divide((u * cc - cu * c).to(KIND), spread), tl.maximum(apart, 1.0)


@triton.jit
def _quantize_levels(
    source,
    mean,
    rstd,
    codes,
    scales,
    n,
    nbytes,
    inner,
    sections,
    LIMIT: tl.constexpr,
    CENTERED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    LLOYD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Groups of 64 elements as the nearest of four levels, which are fitted to them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(rows.to(tl.int64)[:, None] * _LEVELS + tl.arange(0, _LEVELS)[None, :], n - 1)
    wide = _load_normalized(source, mean, rstd, rows * _LEVELS, at, n, inner, sections, CENTERED, NORMALIZED)
    finite = tl.min((tl.abs(wide) < float("inf")).to(tl.int32), axis=1) != 0
    wide = tl.where(finite[:, None], wide, 0)
    low = tl.min(wide, axis=1)
    high = tl.max(wide, axis=1)
    tiny = 2.2250738585072014e-308 if wide.dtype == tl.float64 else 1.1754943508222875e-38
    parts = tl.full((ROWS,), 255, wide.dtype)
    unit = tl.maximum(_divide(high, parts) - _divide(low, parts), tiny)
    unit = tl.where(finite, unit, 1)
    exact = _steps_from(wide, low, unit, 255.0)
    steps = exact.to(tl.int32)
    code = (steps + 42) // 85
    for _ in tl.static_range(LLOYD):
        level, apart = _fit_levels(steps, code, wide.dtype)
        code = _steps_from(exact, level, apart, 3.0).to(tl.int32)
    level, apart = _fit_levels(steps, code, wide.dtype)
    offset = tl.minimum(tl.maximum(level * unit, -LIMIT), LIMIT)
    offset = tl.minimum(tl.maximum(low + offset, -LIMIT), LIMIT)
    offset = tl.where(tl.abs(offset) >= tiny, offset, 0)
    scale = tl.minimum(tl.maximum(apart * unit, tiny), LIMIT)
    inside = rows.to(tl.int64) * _LEVELS < n
    if source.dtype.element_ty == tl.float64:
        tl.store(scales + 2 * rows, tl.where(finite, offset, float("nan")), mask=inside)
        tl.store(scales + 2 * rows + 1, scale, mask=inside)
        code = _steps_from(wide, offset, scale, 3.0).to(tl.int32)
    else:
        narrow_offset = _to_bfloat16(offset)
        narrow_scale = _to_bfloat16(scale)
        bits = tl.where(finite, narrow_offset.to(tl.int16, bitcast=True), 0x7FC0)
        tl.store(scales + 2 * rows, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(scales + 2 * rows + 1, narrow_scale, mask=inside)
        code = _steps_from(wide, narrow_offset.to(tl.float32), narrow_scale.to(tl.float32), 3.0).to(tl.int32)
    shifts = tl.arange(0, 4)[None, None, :] * 2
    byte = rows.to(tl.int64)[:, None] * (_LEVELS // 4) + tl.arange(0, _LEVELS // 4)[None, :]
    fours = code.reshape(ROWS, _LEVELS // 4, 4) << shifts
    tl.store(codes + byte, tl.sum(fours, axis=2).to(tl.uint8), mask=byte < nbytes)


@triton.jit
def _load_codes(codes, rows, nbytes, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Codes of BITS bits of groups, several in a byte."""
    byte = rows.to(tl.int64)[:, None] * (GROUP * BITS // 8) + tl.arange(0, GROUP * BITS // 8)[None, :]
    loaded = tl.load(codes + byte, mask=byte < nbytes, other=0).to(tl.int32)
    shifts = tl.arange(0, 8 // BITS)[None, None, :] * BITS
    return ((loaded[:, :, None] >> shifts) & ((1 << BITS) - 1)).reshape(ROWS, GROUP)


@triton.jit
def _rescaled(
    x,
    first,
    columns,
    weight,
    bias,
    inner,
    sections,
    lower,
    upper,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESCALED: tl.constexpr,
):
    """``x`` times weight plus bias, between bounds; ``first``: element of each row.

    RESCALED: by one weight a row (1), by those in order (2), or by any (3); 0 leaves ``x`` alone.
    """
    if RESCALED:
        if RESCALED == 1:
            which = (first // inner % sections)[:, None]
        elif RESCALED == 2:
            which = (first % sections)[:, None] + columns[None, :]
        else:
            which = (first[:, None] + columns[None, :]) // inner % sections
        if WEIGHTED:
            x = x * tl.load(weight + which).to(tl.float32)
        if BIASED:
            x = x + tl.load(bias + which).to(tl.float32)
        if BOUNDED:  # and NaN as it is
            x = tl.where(x < lower, lower, tl.where(x > upper, upper, x))
    return x


@triton.jit
def _dequantize_levels(
    codes,
    scales,
    dense,
    n,
    nbytes,
    weight,
    bias,
    inner,
    sections,
    lower,
    upper,
    LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESCALED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Offset + code * scale, no larger than LIMIT, and rescaled."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _LEVELS)
    at = rows.to(tl.int64)[:, None] * _LEVELS + columns[None, :]
    code = _load_codes(codes, rows, nbytes, 2, _LEVELS, ROWS)
    inside = rows.to(tl.int64) * _LEVELS < n
    offset = tl.load(scales + 2 * rows, mask=inside, other=0)
    scale = tl.load(scales + 2 * rows + 1, mask=inside, other=0)
    if scales.dtype.element_ty != tl.float64:
        offset = offset.to(tl.float32)
        scale = scale.to(tl.float32)
    # In eighths, whose products and sums are finite.
    product = code.to(scale.dtype) * (scale * 0.125)[:, None]
    if scales.dtype.element_ty == tl.float64:
        product = tl.minimum(product, 1.7976931348623157e308)  # else it is fused with the sum; in float32 it is exact
    value = tl.minimum(tl.maximum((offset * 0.125)[:, None] + product, -LIMIT * 0.125), LIMIT * 0.125) * 8
    value = tl.where((offset != offset)[:, None], float("nan"), value)
    value = _rescaled(
        value,
        rows * _LEVELS,
        columns,
        weight,
        bias,
        inner,
        sections,
        lower,
        upper,
        WEIGHTED,
        BIASED,
        BOUNDED,
        RESCALED,
    )
    kind = dense.dtype.element_ty
    rounded = _to_bfloat16(value, RESCALED != 0) if kind == tl.bfloat16 else value.to(kind)
    tl.store(dense + at, rounded, mask=at < n)


@triton.jit
def _dequantize_groups(
    codes,
    scales,
    dense,
    n,
    nbytes,
    weight,
    bias,
    inner,
    sections,
    lower,
    upper,
    LIMIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESCALED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes times scales, no larger than LIMIT, and rescaled; NaN for the lowest code."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _GROUP)
    at = rows.to(tl.int64)[:, None] * _GROUP + columns[None, :]
    if BITS != 4:
        code = tl.load(codes + at, mask=at < n, other=0).to(tl.int32)
    else:
        code = _load_codes(codes, rows, nbytes, 4, _GROUP, ROWS) - 8
    scale = tl.load(scales + rows, mask=rows.to(tl.int64) * _GROUP < n, other=0)
    if scales.dtype.element_ty == tl.int16:
        wide = ((scale.to(tl.int64) & 0xFFFF) << 47).to(tl.float64, bitcast=True)
    else:
        wide = scale.to(tl.float32)
    product = tl.minimum(tl.maximum(code.to(wide.dtype) * wide[:, None], -LIMIT), LIMIT)
    product = tl.where(code == -(1 << (BITS - 1)), float("nan"), product)
    product = _rescaled(
        product,
        rows * _GROUP,
        columns,
        weight,
        bias,
        inner,
        sections,
        lower,
        upper,
        WEIGHTED,
        BIASED,
        BOUNDED,
        RESCALED,
    )
    kind = dense.dtype.element_ty
    rounded = _to_bfloat16(product, RESCALED != 0) if kind == tl.bfloat16 else product.to(kind)
    tl.store(dense + at, rounded, mask=at < n)


@triton.jit
def _range_bitmask_blocks(source, bits, n, nbytes, lower, upper, BOUNDED: tl.constexpr, ROWS: tl.constexpr):
    """Bits of which elements are neither at or below ``lower`` nor, where BOUNDED, at or above ``upper``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _BLOCK)
    at = rows.to(tl.int64)[:, None] * _BLOCK + columns[None, :]
    x = tl.load(source + at, mask=at < n, other=0).to(tl.float32)
    outside = (x <= lower) | (at >= n)
    if BOUNDED:
        outside |= x >= upper
    weights = ((~outside).to(tl.int32) << (columns % 8)[None, :]).reshape(ROWS, _BLOCK // 8, 8)
    byte = rows.to(tl.int64)[:, None] * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
    tl.store(bits + byte, tl.sum(weights, axis=2).to(tl.uint8), mask=byte < nbytes)


@triton.jit
def _apply_bitmask_blocks(source, bits, kept, n, nbytes, ROWS: tl.constexpr):
    """The elements that are marked, zeros elsewhere."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, _BLOCK)
    at = rows.to(tl.int64)[:, None] * _BLOCK + columns[None, :]
    x = tl.load(source + at, mask=at < n, other=0)
    tl.store(kept + at, tl.where(_load_bits(bits, rows, nbytes, ROWS), x, 0), mask=at < n)


def _operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an operator of a function that launches a kernel; where possible call it directly, in 0.3 ms less."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = triton_op(f"dropit::{name}", function, mutates_args=())

        @functools.wraps(function)
        def call(x: Tensor, *arguments: Any) -> Any:
            return (function if is_plain(x) else operator)(x, *arguments)

        return call

    return decorate


# How many rows, of 256 elements or of 32, one program works on, and in how many warps: the fastest, or nearly, of those
# tried on an H100 (benchmarks/NOTES.md). Tuning at run time would cost each launch 20 us, and may choose otherwise on
# another rank.
_UNPACK, _GROUPS, _MARK, _KEEP = (8, 8), (32, 1), (8, 4), (8, 2)
_PACK = (1, 1)  # not tried: a warp needs no barriers, and ends with its own row
_LEVELS_SIZE = (16, 1)  # not tried on a GPU yet


def _launch(kernel: Any, size: tuple[int, int], x: Tensor, rows: int, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` on the device of ``x``, a program of ``size`` for each few of so many rows."""
    each, warps = size
    grid = (-(-rows // each),)
    if rows == 0:
        return
    if not is_plain(x):
        wrap_triton(kernel)[grid](*arguments, ROWS=each, num_warps=warps, **constants)
    elif x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, ROWS=each, num_warps=warps, **constants)
    else:
        kernel[grid](*arguments, ROWS=each, num_warps=warps, **constants)


@_operator("pack_blocks")
def _pack_blocks_op(flat: Tensor, k: int, rest_k: int, in_bits: bool) -> tuple[Tensor, Tensor]:
    """Values and positions of the largest of each block of 256."""
    n = flat.numel()
    total = n // OFFSET_BLOCK * k + rest_k
    integers = flat.view(reference.INTEGER_OF_SIZE[flat.element_size()])
    values = torch.empty(total, dtype=integers.dtype, device=flat.device)
    positions = torch.empty(bits_nbytes(n) if in_bits else total, dtype=torch.uint8, device=flat.device)
    rows = -(-n // OFFSET_BLOCK)
    _launch(
        _pack_blocks,
        _PACK,
        flat,
        rows,
        integers,
        values,
        positions,
        n,
        k,
        rest_k,
        len(positions),
        BITS=8 * flat.element_size(),
        IN_BITS=in_bits,
    )
    return values.view(flat.dtype), positions


@_operator("unpack_blocks")
def _unpack_blocks_op(
    values: Tensor, positions: Tensor, starts: Tensor, n: int, k: int, counted: bool, in_bits: bool
) -> Tensor:
    """(n,) with the values in their places. ``starts``: of each block's values, or how many there are in all."""
    dense = torch.empty(n, dtype=values.dtype, device=values.device)
    rows = -(-n // OFFSET_BLOCK)
    _launch(
        _unpack_blocks,
        _UNPACK,
        values,
        rows,
        values,
        positions,
        starts,
        dense,
        n,
        len(positions),
        k,
        COUNTED=counted,
        IN_BITS=in_bits,
        WIDTH=OFFSET_BLOCK if counted else 1 << (k - 1).bit_length(),
    )
    return dense


@_operator("quantize_groups")
def _quantize_op(
    flat: Tensor, noise: Tensor | None, bits: int, mean: Tensor | None, rstd: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales; with ``rstd``, of what is normalized."""
    n, double = flat.numel(), flat.dtype is torch.float64
    statistics = (mean, rstd, inner)
    if bits == 2:
        stored = torch.float64 if double else torch.bfloat16
        codes = torch.empty(-(-n // 4), dtype=torch.uint8, device=flat.device)
        scales = torch.empty((-(-n // LEVELS_GROUP), 2), dtype=stored, device=flat.device)
        # The limit as a constant, since arguments reach a kernel in single precision.
        constants = {"LIMIT": torch.finfo(stored).max, "LLOYD": reference.LLOYD}
        _launch_quantizer(_quantize_levels, _LEVELS_SIZE, LEVELS_GROUP, flat, statistics, codes, scales, **constants)
        return codes, scales
    size, kind = {16: (n, torch.int16), 8: (n, torch.int8), 4: (-(-n // 2), torch.uint8)}[bits]
    top, most = map(float, reference.CODES[bits])
    codes = torch.empty(size, dtype=kind, device=flat.device)
    scales = torch.empty(-(-n // SCALE_GROUP), dtype=torch.int16 if double else torch.bfloat16, device=flat.device)
    _launch_quantizer(
        _quantize_groups,
        _GROUPS,
        SCALE_GROUP,
        flat,
        statistics,
        codes,
        scales,
        flat if noise is None else noise,
        top,
        most,
        NOISY=noise is not None,
        BITS=bits,
    )
    return codes, scales


def _launch_quantizer(
    kernel: Any,
    size: tuple[int, int],
    group: int,
    flat: Tensor,
    statistics: tuple[Tensor | None, Tensor | None, int],
    codes: Tensor,
    scales: Tensor,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Run ``kernel``, a row for each ``group`` elements of ``flat``, normalized by ``statistics`` if there are any."""
    mean, rstd, inner = statistics
    _launch(
        kernel,
        size,
        flat,
        len(scales),
        flat,
        flat if mean is None else mean,
        flat if rstd is None else rstd,
        codes,
        scales,
        flat.numel(),
        len(codes),
        inner,
        1 if rstd is None else rstd.numel(),
        *arguments,
        CENTERED=mean is not None,
        NORMALIZED=0 if rstd is None else 1 if inner % group == 0 else 2,
        **constants,
    )


@_operator("dequantize_groups")
def _dequantize_op(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    n: int,
    weight: Tensor | None,
    bias: Tensor | None,
    inner: int,
    lower: float,
    upper: float,
    result: torch.dtype,
) -> Tensor:
    """(n,) of ``result``."""
    dense = torch.empty(n, dtype=result, device=codes.device)
    given = weight if bias is None else bias
    sections = 1 if given is None else given.numel()
    kernel, size, group = (
        (_dequantize_levels, _LEVELS_SIZE, LEVELS_GROUP)
        if scales.dim() == 2
        else (_dequantize_groups, _GROUPS, SCALE_GROUP)
    )
    constants: dict[str, Any] = {"LIMIT": torch.finfo(dtype).max}
    if scales.dim() == 1:
        constants["BITS"] = {torch.int16: 16, torch.int8: 8, torch.uint8: 4}[codes.dtype]
    in_order = 2 if inner == 1 and sections % group == 0 else 3
    _launch(
        kernel,
        size,
        codes,
        len(scales),
        codes,
        scales,
        dense,
        n,
        len(codes),
        codes if weight is None else weight,
        codes if bias is None else bias,
        inner,
        sections,
        lower,
        upper,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        BOUNDED=lower > -math.inf or upper < math.inf,
        RESCALED=0 if given is None else 1 if inner % group == 0 else in_order,
        **constants,
    )
    return dense


@_operator("range_bitmask")
def _range_bitmask_op(flat: Tensor, lower: float, upper: float) -> Tensor:
    """Bits."""
    n = flat.numel()
    bits = torch.empty(bits_nbytes(n), dtype=torch.uint8, device=flat.device)
    rows = -(-n // OFFSET_BLOCK)
    _launch(_range_bitmask_blocks, _MARK, flat, rows, flat, bits, n, len(bits), lower, upper, BOUNDED=upper < math.inf)
    return bits


@_operator("apply_bitmask")
def _apply_bitmask_op(flat: Tensor, bits: Tensor) -> Tensor:
    """(n,) of the dtype of ``flat``."""
    kept = torch.empty_like(flat)
    n = flat.numel()
    _launch(_apply_bitmask_blocks, _KEEP, flat, -(-n // OFFSET_BLOCK), flat, bits, kept, n, len(bits))
    return kept


def pack_largest(
    flat: Tensor,
    block_size: int,
    count: int,
    rest_count: int,
    layout: Layout,
    value_dtype: torch.dtype | None = None,
) -> Packed:
    """As :func:`dropit.ops.reference.pack_largest`, in blocks of 256; others are the reference's."""
    if block_size != OFFSET_BLOCK or layout.per_block is None:
        return reference.pack_largest(flat, block_size, count, rest_count, layout, value_dtype)
    n = flat.numel()
    rest_count = rest_count if n % block_size else 0
    total = n // block_size * count + rest_count
    in_bits = positions_nbytes(n, total, count) == bits_nbytes(n)
    values, positions = _pack_blocks_op(flat, count, rest_count, in_bits)
    if value_dtype is None:
        return Packed(values, positions, None, layout)
    narrowed, scales = narrow(values, value_dtype)
    return Packed(narrowed, positions, scales, layout)


def unpack(packed: Packed) -> Tensor:
    """As :func:`dropit.ops.reference.unpack`."""
    layout, positions, values = packed.layout, packed.positions, packed.values
    if packed.is_dense or layout.channel_dim is not None:
        return reference.unpack(packed)
    if packed.scales is not None:
        values = dequantize(
            values, packed.scales, layout.dtype, values.numel() if positions is not None else layout.numel
        )
    else:
        values = values.to(layout.dtype)
    if positions is None:
        return unflatten(values if values.dim() == 1 else values.reshape(-1), layout)
    n, per_block = layout.numel, layout.per_block
    in_bits = positions.numel() == bits_nbytes(n)
    blocks = -(-n // OFFSET_BLOCK)
    if per_block is not None:
        starts = torch.full((1,), values.numel(), device=values.device)
        return unflatten(_unpack_blocks_op(values, positions, starts, n, per_block, False, in_bits), layout)
    if in_bits:
        ones = reference.unpack_bits(positions, n).to(torch.uint8)
        counts = torch.nn.functional.pad(ones, (0, -n % OFFSET_BLOCK)).view(blocks, -1).sum(dim=1)
    else:
        counts, positions = positions[: 2 * blocks].view(torch.int16), positions[2 * blocks :]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return unflatten(_unpack_blocks_op(values, positions, starts, n, 0, True, in_bits), layout)


def narrow(values: Tensor, value_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """As :func:`dropit.ops.reference.narrow`."""
    if value_dtype is torch.int8 and values.element_size() > 1:
        return quantize(values)
    return reference.narrow(values, value_dtype)


def quantize(
    x: Tensor, bits: int = 8, noise: Tensor | None = None, statistics: reference.Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`dropit.ops.reference.quantize`, of ``x`` (n,) after :func:`dropit.ops.reference.normalize`."""
    if statistics is not None and x.numel() >= 2**31:  # whose places are counted in 32 bits
        return quantize(reference.normalize(x, statistics), bits, noise)
    mean, rstd, inner = statistics or (None, None, 1)
    if x.dim() != 1:  # a view of what has the form already would take 3 us of a call's 20
        noise = None if noise is None else noise.reshape(-1)
        codes, scales = quantize(x.reshape(-1), bits, noise, statistics)
        return codes.view(x.shape) if bits >= 8 else codes, scales
    return _quantize_op(x, noise, bits, mean, rstd, inner)  # type: ignore[no-any-return]


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int, rescaling: reference.Rescaling | None = None
) -> Tensor:
    """As :func:`dropit.ops.reference.dequantize`."""
    codes = codes if codes.dim() == 1 else codes.reshape(-1)
    if rescaling is None:
        return _dequantize_op(codes, scales, dtype, n, None, None, 1, -math.inf, math.inf, dtype)  # type: ignore[no-any-return]
    result = rescaling.result_type(dtype)
    if torch.float64 in (dtype, result) or n >= 2**31:  # bounds reach a kernel in single precision
        dense = dequantize(codes, scales, reference.computed_in(dtype, rescaling), n)
        return reference.rescale(dense, rescaling, result)
    return _dequantize_op(codes, scales, torch.float32, n, *rescaling[:5], result)  # type: ignore[no-any-return]


def range_bitmask(flat: Tensor, lower: float, upper: float) -> Tensor:
    """As :func:`dropit.ops.reference.range_bitmask`."""
    if flat.dtype is torch.float64:
        return reference.range_bitmask(flat, lower, upper)  # the bounds reach a kernel in single precision
    return _range_bitmask_op(flat, reference.rounded(lower, flat.dtype), reference.rounded(upper, flat.dtype))  # type: ignore[no-any-return]


def apply_bitmask(flat: Tensor, bits: Tensor) -> Tensor:
    """As :func:`dropit.ops.reference.apply_bitmask`."""
    return _apply_bitmask_op(flat, bits)  # type: ignore[no-any-return]
