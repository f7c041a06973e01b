"""The operations that C or NumPy does faster than PyTorch on a CPU: the same results as ``reference``, bit for bit.

Times are ns per element of a float32 tensor of 4 M elements, one in ten kept of each block of 256, on one core
(torch 2.14, NumPy 2.4). PyTorch's way, through a mask: 5.3. By C 1.1, of which finding each block's threshold takes
half; PyTorch's threads share it. By NumPy, where there is no compiler, 2.0: ``partition`` on integers 0.8 (``topk``
3.4, ``kthvalue`` 6.8, a sort 14.6), taking the signs off 0.2, comparing 0.3, ``flatnonzero`` 0.5 (``nonzero`` 0.9),
taking the values 0.2. What matters as much is to work in pieces that stay in the processor's own memory: a new tensor
of this size costs 0.9 to fill, whatever with.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropit.ops import native, reference
from dropit.packed import OFFSET_BLOCK, Layout, Packed, bits_nbytes, positions_nbytes, unflatten

__all__ = ["apply_bitmask", "dequantize", "pack_largest", "quantize", "range_bitmask", "unpack"]
_NATIVE = (torch.float32, torch.bfloat16)
_PIECE = 2**18  # elements that are worked on at a time: in shorter pieces threads wait for each other
# Fewer are worked on by one thread: PyTorch's own wait for work by spinning, and keep the other cores for some ms.
_MANY = 2**23
# The longest block that ``partition`` is used for. Beyond, equal elements, as ReLU's zeros, slow it down a hundredfold.
_PARTITION = 512
_LOOKED_AT = 2**14  # the longest that is selected from by C, which looks at all of it several times
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)  # of each byte
_pool: ThreadPoolExecutor | None = None


def pack_largest(
    flat: Tensor,
    block_size: int,
    count: int,
    rest_count: int,
    layout: Layout,
    value_dtype: torch.dtype | None = None,
) -> Packed:
    """As :func:`dropit.ops.reference.pack_largest`."""
    rest_count = min(rest_count, flat.numel() % block_size)
    select = _select_op if torch.compiler.is_compiling() else _select
    values, positions = select(flat, block_size, count, rest_count, layout.per_block)
    narrowed, scales = reference.narrow(values, value_dtype)
    return Packed(narrowed, positions, scales, layout)


def unpack(packed: Packed) -> Tensor:
    """As :func:`dropit.ops.reference.unpack`; positions in bits take 0.3 ns, by NumPy 1.2, by a mask 3."""
    n = packed.layout.numel
    if packed.positions is None and packed.scales is not None:
        return unflatten(dequantize(packed.values, packed.scales, packed.layout.dtype, n), packed.layout)
    if packed.positions is None or packed.layout.channel_dim is not None or len(packed.positions) != bits_nbytes(n):
        return reference.unpack(packed)
    values = reference.widen(packed.values, packed.scales, packed.layout.dtype)
    place = _place_op if torch.compiler.is_compiling() else _place
    return unflatten(place(values, packed.positions, n), packed.layout)


def quantize(
    x: Tensor, bits: int = 8, noise: Tensor | None = None, statistics: reference.Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`dropit.ops.reference.quantize`, by C: to 8 bits 0.5 ns on one core, to 2 bits 1.7.

    Else as the reference, which takes 1.1 and, to 2 bits piece by piece, 6.0.
    """
    mean, rstd, _ = statistics or (None, None, 1)
    narrow = x.dtype in _NATIVE and (rstd is None or rstd.dtype is torch.float32)
    if narrow and noise is None and native.takes(x, mean, rstd):
        return native.quantize(x, bits, statistics)
    if bits != 2 or x.numel() <= _PIECE or torch.compiler.is_compiling():
        return reference.quantize(x, bits, noise, statistics)
    x = x if statistics is None else reference.normalize(x, statistics)
    pieces = [reference.quantize(piece, bits) for piece in x.reshape(-1).split(_PIECE)]
    codes, scales = zip(*pieces, strict=True)
    return torch.cat(codes), torch.cat(scales)


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int, rescaling: reference.Rescaling | None = None
) -> Tensor:
    """As :func:`dropit.ops.reference.dequantize`: from 8 bits 0.13 ns on one core, where the reference takes 0.35."""
    weight, bias, *_ = rescaling or (None, None)
    dtypes = {dtype, torch.float32 if rescaling is None else rescaling.result_type(dtype)}
    dtypes |= {each.dtype for each in (weight, bias) if each is not None}
    narrow = dtypes <= set(_NATIVE) and scales.dtype is torch.bfloat16
    if narrow and native.takes(codes, scales, weight, bias):
        return native.dequantize(codes, scales, dtype, n, rescaling)
    return reference.dequantize(codes, scales, dtype, n, rescaling)


def range_bitmask(flat: Tensor, lower: float, upper: float) -> Tensor:
    """As :func:`dropit.ops.reference.range_bitmask`, piece by piece: 0.25 ns, of the whole at once 0.4."""
    if flat.dtype in _NATIVE and native.takes(flat):
        return native.range_bitmask(flat, lower, upper)
    if flat.dtype not in (torch.float32, torch.float64):
        return reference.range_bitmask(flat, lower, upper)  # NumPy has no bfloat16, and is slow with float16
    bits = torch.empty(bits_nbytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    numbers, marks = flat.numpy(), bits.numpy()
    for start in range(0, len(numbers), _PIECE):
        piece = numbers[start : start + _PIECE]
        outside = piece <= lower
        if upper < math.inf:
            outside |= piece >= upper
        marks[start // 8 : (start + _PIECE) // 8] = np.packbits(~outside, bitorder="little")
    return bits


def apply_bitmask(flat: Tensor, bits: Tensor) -> Tensor:
    """As :func:`dropit.ops.reference.apply_bitmask`: 0.5 ns, by ``torch.where`` 2.3."""
    if flat.element_size() in (2, 4) and native.takes(flat, bits):
        return native.apply_bitmask(flat, bits)
    integer = reference.INTEGER_OF_SIZE[flat.element_size()]
    marks = torch.from_numpy(np.unpackbits(bits.numpy(), count=flat.numel(), bitorder="little"))
    ones = marks.view(torch.int8).neg_().to(integer)  # all bits of an element that is marked
    return ones.bitwise_and_(flat.view(integer)).view(flat.dtype)


def _kept(n: int, block_size: int, count: int, rest_count: int) -> int:
    return n // block_size * count + rest_count


def _select(flat: Tensor, block_size: int, count: int, rest_count: int, per_block: int | None) -> tuple[Tensor, Tensor]:
    """Values and positions."""
    n = flat.numel()
    end = n // block_size * block_size
    total = _kept(n, block_size, count, rest_count)
    values = torch.empty(total, dtype=flat.dtype, device=flat.device)
    positions = torch.zeros(positions_nbytes(n, total, per_block), dtype=torch.uint8, device=flat.device)
    if _is_short(n, block_size) and flat.element_size() in (2, 4) and native.takes(flat):
        native.select(flat, block_size, count, rest_count, values, positions, counted=per_block is None)
        return values, positions
    integers, kept = (x.view(reference.INTEGER_OF_SIZE[flat.element_size()]).numpy() for x in (flat, values))
    write_positions = _write_bits if len(positions) == bits_nbytes(n) else partial(_write_offsets, per_block is None, n)

    def write(piece: Any, start: int, first: int, indices: Any, mask: Any) -> None:
        """Store what is kept of the elements from ``start``, the first of it in place ``first``."""
        np.take(piece, indices, out=kept[first : first + len(indices)], mode="clip")
        write_positions(positions.numpy(), start, first, indices, mask)

    def work(start: int, stop: int, size: int, k: int) -> None:
        """Pack the elements from ``start`` to ``stop``, blocks of ``size``, ``k`` of each."""
        piece = integers[start:stop]
        write(piece, start, start // block_size * count, *_largest(piece, size, k))

    if block_size == n > _PIECE:
        _select_of_all(integers, count, write)
        return values, positions
    # A piece is of whole blocks, and of whole bytes of bits and whole blocks of offsets too.
    step = math.lcm(block_size, OFFSET_BLOCK)
    step *= max(1, _PIECE // step)
    _in_threads(n, work, [(start, min(start + step, end), block_size, count) for start in range(0, end, step)])
    if end < n:
        work(end, n, n - end, rest_count)
    return values, positions


def _is_short(n: int, block_size: int) -> bool:
    """Whether blocks are of whole words of bits, and stay in the processor's own memory while they are looked at."""
    return min(n, block_size) <= _LOOKED_AT and (block_size % 64 == 0 or n <= block_size)


def _largest(piece: Any, size: int, k: int) -> tuple[Any, Any]:
    """Of (blocks * size,) integers that are floats' bits: where the ``k`` largest magnitudes of each block are."""
    sign_off = np.iinfo(piece.dtype).max
    score = piece & sign_off
    blocks = score.reshape(-1, size)
    if size <= _PARTITION:
        blocks.partition(size - k, axis=1)
    else:
        blocks.sort(axis=1)
    threshold = blocks[:, size - k].copy()[:, None]
    np.bitwise_and(piece, sign_off, out=score)  # in their places again
    mask = blocks >= threshold
    indices = np.flatnonzero(mask)
    if len(indices) > len(blocks) * k:
        extra = _after_the_first(indices, score, threshold, size, k)
        mask.reshape(-1)[indices[extra]] = False
        indices = indices[~extra]
    return indices, mask


def _after_the_first(indices: Any, score: Any, threshold: Any, size: int, k: int) -> Any:
    """Which of the indices are of elements equal to their block's threshold that come after the first that fit."""
    block = indices // size
    starts = np.searchsorted(indices, np.arange(0, len(score), size))
    at = score[indices] == threshold[block, 0]
    ranks = at.cumsum()  # of those at the threshold, from one
    before = np.concatenate([[0], ranks])[starts]
    found = np.diff(starts, append=len(indices))
    fitting = k - (found - np.add.reduceat(at, starts, dtype=np.int64))
    return at & (ranks > (before + fitting)[block])


def _select_of_all(integers: Any, k: int, write: Callable[..., None]) -> None:
    """Find the ``k`` largest magnitudes of one long block, and ``write`` them piece by piece."""
    threshold, fitting = _kth_largest(integers, k)
    sign_off = np.iinfo(integers.dtype).max
    starts = range(0, len(integers), _PIECE)

    def count(start: int) -> tuple[int, int]:
        score = integers[start : start + _PIECE] & sign_off
        return int(np.count_nonzero(score > threshold)), int(np.count_nonzero(score == threshold))

    above, at = np.array(_in_threads(len(integers), count, [(start,) for start in starts])).T
    at = np.diff(np.minimum(at.cumsum(), fitting), prepend=0)  # of each piece, those that are kept
    firsts = (above + at).cumsum() - (above + at)

    def work(start: int, first: int, ties: int) -> None:
        piece = integers[start : start + _PIECE]
        score = piece & sign_off
        mask = score > threshold
        if ties:
            mask[np.flatnonzero(score == threshold)[:ties]] = True
        write(piece, start, first, np.flatnonzero(mask), mask)

    _in_threads(len(integers), work, list(zip(starts, firsts.tolist(), at.tolist(), strict=True)))


def _kth_largest(integers: Any, k: int) -> tuple[int, int]:
    """The ``k``-th largest magnitude, and how many of those equal to it are among the ``k`` largest.

    By counting the magnitudes' digits of 16 bits, the highest first, and then only those that begin alike.
    """
    sign_off = np.iinfo(integers.dtype).max
    found, top = 0, 8 * integers.itemsize - 16
    for shift in range(top, -1, -16):

        def count(start: int, shift: int = shift, found: int = found) -> Any:
            score = integers[start : start + _PIECE] & sign_off
            if shift == top:
                return np.bincount(score >> shift, minlength=2**16)
            score = score[score >> (shift + 16) == found]
            return np.bincount((score >> shift) & 0xFFFF, minlength=2**16)

        jobs = [(start,) for start in range(0, len(integers), _PIECE)]
        counts = sum(_in_threads(len(integers), count, jobs))
        as_large = counts[::-1].cumsum()[::-1]  # of each digit, those that are not below it
        digit = int(np.flatnonzero(as_large >= k)[-1])
        k -= int(as_large[digit] - counts[digit])
        found = found << 16 | digit
    return found, k


def _place(values: Tensor, bits: Tensor, n: int) -> Tensor:
    """(n,) with the values where the bits are set."""
    if values.element_size() in (2, 4) and native.takes(values, bits):
        return native.place(values, bits, n)
    dense = values.new_zeros(n)
    marks = bits.numpy()
    placed, kept = (x.view(reference.INTEGER_OF_SIZE[x.element_size()]).numpy() for x in (dense, values))
    counts = np.add.reduceat(_ONES[marks], np.arange(0, len(marks), _PIECE // 8), dtype=np.int64)
    lasts = counts.cumsum().tolist()

    def work(start: int, first: int, last: int) -> None:
        piece = placed[start : start + _PIECE]
        mask = np.unpackbits(marks[start // 8 : (start + _PIECE) // 8], count=len(piece), bitorder="little")
        piece[np.flatnonzero(mask.view(np.bool_))] = kept[first:last]

    starts = range(0, n, _PIECE)
    _in_threads(n, work, list(zip(starts, [0, *lasts][: len(lasts)], lasts, strict=True)))
    return dense


def _write_bits(positions: Any, start: int, first: int, indices: Any, mask: Any) -> None:
    before = np.zeros(start % 8, dtype=bool)  # of a byte that other elements share
    bits = np.packbits(np.concatenate([before, mask.reshape(-1)]) if len(before) else mask, bitorder="little")
    positions[start // 8 : start // 8 + len(bits)] |= bits


def _write_offsets(counted: bool, n: int, positions: Any, start: int, first: int, indices: Any, mask: Any) -> None:
    counts_nbytes = 2 * -(-n // OFFSET_BLOCK) if counted else 0
    places = indices + start % OFFSET_BLOCK if start % OFFSET_BLOCK else indices
    offsets = positions[counts_nbytes + first :][: len(indices)]
    np.bitwise_and(places, OFFSET_BLOCK - 1, out=offsets, casting="unsafe")
    if counted:
        found = np.bincount(places // OFFSET_BLOCK)
        positions[:counts_nbytes].view(np.int16)[start // OFFSET_BLOCK :][: len(found)] += found.astype(np.int16)


def _in_threads(n: int, work: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """Run as many jobs on ``n`` elements at a time as PyTorch uses threads; NumPy releases the GIL meanwhile."""
    global _pool
    threads = torch.get_num_threads()
    if n < _MANY or threads < 2:
        return [work(*job) for job in jobs]
    if _pool is None or _pool._max_workers != threads:
        _pool = ThreadPoolExecutor(threads, thread_name_prefix="dropit")
    return list(_pool.map(lambda job: work(*job), jobs))


def _forget_threads() -> None:
    global _pool
    _pool = None  # a forked process has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

# As operators, which compilers take whole. Calling the functions saves eager code some 20 us a call.
_select_op = torch.library.custom_op("dropit::select_on_cpu", _select, mutates_args=(), device_types="cpu")
_place_op = torch.library.custom_op("dropit::place_on_cpu", _place, mutates_args=(), device_types="cpu")


@_select_op.register_fake
def _(flat: Tensor, block_size: int, count: int, rest_count: int, per_block: int | None) -> tuple[Tensor, Tensor]:
    n = flat.numel()
    total = _kept(n, block_size, count, rest_count)
    return flat.new_empty(total), flat.new_empty(positions_nbytes(n, total, per_block), dtype=torch.uint8)


@_place_op.register_fake
def _(values: Tensor, bits: Tensor, n: int) -> Tensor:
    return values.new_empty(n)
