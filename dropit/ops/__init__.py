"""What packing and unpacking are made of. ``reference`` is the specification, in plain PyTorch, on any device.

Where another module has a faster way to the same result, the functions here take it, by the tensor's device.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dropit.ops import reference
from dropit.ops.reference import (
    Statistics,
    largest_mask,
    magnitude,
    pack,
    pack_bits,
    pack_channels,
    pack_small,
    topk_mask,
    unpack_bits,
    unpack_small,
)
from dropit.packed import Layout, Packed
from dropit.tracing import is_traced

__all__ = [
    "Statistics",
    "dequantize",
    "keep_marked",
    "largest_mask",
    "magnitude",
    "mark_inside",
    "pack",
    "pack_bits",
    "pack_channels",
    "pack_largest",
    "pack_small",
    "quantize",
    "topk_mask",
    "unpack",
    "unpack_bits",
    "unpack_small",
]
# PyTorch works without either.
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _HAS_TRITON and (torch.compiler.is_compiling() or not is_traced())


def _best(x: Tensor) -> Any:
    """The module whose functions are the fastest for ``x``."""
    if _has_kernels(x):
        from dropit.ops import triton

        return triton
    if x.device.type == "cpu" and _HAS_NUMPY and (torch.compiler.is_compiling() or not is_traced()):
        from dropit.ops import cpu

        return cpu
    return reference


def _best_alone(x: Tensor) -> Any:
    """The same, where a compiler is left to merge plain PyTorch with what comes before and after."""
    return reference if is_traced() else _best(x)


def pack_largest(
    flat: Tensor,
    block_size: int,
    count: int,
    rest_count: int,
    layout: Layout,
    value_dtype: torch.dtype | None = None,
) -> Packed:
    """Keep of ``flat`` (n,) the largest by magnitude, ``count`` of each block, ``rest_count`` of what is left."""
    return _best(flat).pack_largest(flat, block_size, count, rest_count, layout, value_dtype)  # type: ignore[no-any-return]


def unpack(packed: Packed) -> Tensor:
    """The dense tensor: kept elements at their positions, zeros elsewhere; the order in memory is the original's."""
    return _best(packed.values).unpack(packed)  # type: ignore[no-any-return]


def quantize(
    x: Tensor, bits: int = 8, noise: Tensor | None = None, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """Each group of 32 elements as 8- or 4-bit steps, and its scale: :func:`dropit.ops.reference.quantize`.

    With ``statistics``: of ``x`` (n,) after :func:`dropit.ops.reference.normalize`.
    """
    if statistics is None:
        return _best(x).quantize(x, bits, noise)  # type: ignore[no-any-return]
    if _has_kernels(x) and x.numel() < 2**31:
        return _best(x).quantize(x, bits, noise, statistics)  # type: ignore[no-any-return]
    return quantize(reference.normalize(x, statistics), bits, noise)


def dequantize(steps: Tensor, scales: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    """Undo :func:`quantize`, but for what was rounded: (n,) of ``dtype``."""
    return _best(steps).dequantize(steps, scales, dtype, n)  # type: ignore[no-any-return]


def mark_inside(flat: Tensor, lower: float, upper: float) -> Tensor:
    """Bits of where ``flat`` (n,) lies between ``lower`` and ``upper``: :func:`dropit.ops.reference.mark_inside`."""
    return _best_alone(flat).mark_inside(flat, lower, upper)  # type: ignore[no-any-return]


def keep_marked(flat: Tensor, bits: Tensor) -> Tensor:
    """``flat`` (n,) where the bits are set, zeros elsewhere."""
    return _best_alone(flat).keep_marked(flat, bits)  # type: ignore[no-any-return]
