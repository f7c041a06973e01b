"""What packing and unpacking are made of. ``reference`` is the specification, in plain PyTorch, on any device."""

from dropit.ops.reference import magnitude, pack, topk_mask, unpack

__all__ = ["magnitude", "pack", "topk_mask", "unpack"]
