"""What packing and unpacking are made of. ``reference`` is the specification, in plain PyTorch, on any device."""

from dropit.ops.reference import (
    dequantize,
    magnitude,
    pack,
    pack_bits,
    pack_channels,
    pack_small,
    quantize,
    topk_mask,
    unpack,
    unpack_bits,
    unpack_small,
)

__all__ = [
    "dequantize",
    "magnitude",
    "pack",
    "pack_bits",
    "pack_channels",
    "pack_small",
    "quantize",
    "topk_mask",
    "unpack",
    "unpack_bits",
    "unpack_small",
]
