"""What packing and unpacking are made of. ``reference`` is the specification, in plain PyTorch, on any device.

Where another module has a faster way to the same result, the function here takes it, by the tensor's device.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dropit.ops import reference
from dropit.ops.reference import (
    dequantize,
    largest_mask,
    magnitude,
    pack,
    pack_bits,
    pack_channels,
    pack_small,
    quantize,
    topk_mask,
    unpack_bits,
    unpack_small,
)
from dropit.packed import Layout, Packed, bits_nbytes
from dropit.tracing import is_traced

__all__ = [
    "dequantize",
    "largest_mask",
    "magnitude",
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
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None  # PyTorch works without it


def pack_largest(
    flat: Tensor,
    block_size: int,
    count: int,
    rest_count: int,
    layout: Layout,
    value_dtype: torch.dtype | None = None,
) -> Packed:
    """Keep of ``flat`` (n,) the largest by magnitude, ``count`` of each block, ``rest_count`` of what is left."""
    if _is_for_numpy(flat):
        from dropit.ops import cpu

        return cpu.pack_largest(flat, block_size, count, rest_count, layout, value_dtype)
    return reference.pack_largest(flat, block_size, count, rest_count, layout, value_dtype)


def unpack(packed: Packed) -> Tensor:
    """The dense tensor: kept elements at their positions, zeros elsewhere; the order in memory is the original's."""
    layout, positions = packed.layout, packed.positions
    in_bits = positions is not None and positions.numel() == bits_nbytes(layout.numel)
    if in_bits and layout.channel_dim is None and _is_for_numpy(packed.values):
        from dropit.ops import cpu

        return cpu.unpack(packed)
    return reference.unpack(packed)


def _is_for_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu" and _HAS_NUMPY and not is_traced()
