"""Select, pack, unpack, quantize. ``reference`` is the specification, in plain PyTorch, on any device.

Where another module computes the same result faster, the functions here call it, by the tensor's device.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dropit.ops import reference
from dropit.ops.reference import (
    Rescaling,
    Statistics,
    largest_mask,
    magnitude,
    pack,
    pack_bits,
    pack_channels,
    pack_subbyte,
    topk_mask,
    unpack_bits,
    unpack_channels,
    unpack_subbyte,
)
from dropit.packed import Packed
from dropit.tracing import is_plain, is_traced

__all__ = [
    "Rescaling",
    "Statistics",
    "apply_bitmask",
    "backend",
    "dequantize",
    "largest_mask",
    "magnitude",
    "pack",
    "pack_bits",
    "pack_channels",
    "pack_subbyte",
    "quantize",
    "range_bitmask",
    "topk_mask",
    "unpack",
    "unpack_bits",
    "unpack_channels",
    "unpack_subbyte",
]
# PyTorch works without either.
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _HAS_TRITON and (torch.compiler.is_compiling() or not is_traced())


def backend(x: Tensor) -> Any:
    """Return the module whose functions are the fastest for ``x``: reference, cpu or triton."""
    if _has_kernels(x):
        from dropit.ops import triton

        return triton
    if x.device.type == "cpu" and _HAS_NUMPY and (torch.compiler.is_compiling() or is_plain(x)):
        from dropit.ops import cpu

        return cpu
    return reference


def _backend_in_eager(x: Tensor) -> Any:
    """Return the same, but the reference where a compiler can fuse plain PyTorch with what comes before and after."""
    return reference if is_traced() else backend(x)


def unpack(packed: Packed) -> Tensor:
    """The dense tensor: kept elements at their positions, zeros elsewhere; the order in memory is the original's."""
    return backend(packed.values).unpack(packed)  # type: ignore[no-any-return]


def quantize(
    x: Tensor, bits: int = 8, noise: Tensor | None = None, statistics: Statistics | None = None
) -> tuple[Tensor, Tensor]:
    """Each group of 32 elements as 16-, 8- or 4-bit codes, and its scale: :func:`dropit.ops.reference.quantize`.

    In 2 bits each group of 64: :func:`dropit.ops.reference.quantize_to_levels`.
    With ``statistics``: of ``x`` (n,) after :func:`dropit.ops.reference.normalize`.
    """
    if bits == 2 and noise is not None:
        raise ValueError("2 bits are rounded to the nearest level: noise must be None")
    return backend(x).quantize(x, bits, noise, statistics)  # type: ignore[no-any-return]


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int, rescaling: Rescaling | None = None) -> Tensor:
    """Undo :func:`quantize`, but for what was rounded, and rescale: :func:`dropit.ops.reference.dequantize`."""
    return backend(codes).dequantize(codes, scales, dtype, n, rescaling)  # type: ignore[no-any-return]


def range_bitmask(flat: Tensor, lower: float, upper: float) -> Tensor:
    """Bits of where ``flat`` (n,) lies between ``lower`` and ``upper``: :func:`dropit.ops.reference.range_bitmask`."""
    return _backend_in_eager(flat).range_bitmask(flat, lower, upper)  # type: ignore[no-any-return]


def apply_bitmask(flat: Tensor, bits: Tensor) -> Tensor:
    """``flat`` (n,) where the bits are set, zeros elsewhere."""
    return _backend_in_eager(flat).apply_bitmask(flat, bits)  # type: ignore[no-any-return]
