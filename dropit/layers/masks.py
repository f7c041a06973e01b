"""Masks that a layer saves for backward, a bit for each element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropit import ops
from dropit.packed import flatten, is_dense_in_memory, memory_order, unflatten
from dropit.tracing import is_mapped, is_traced


def save_mask(ctx: Any, mask: Tensor) -> None:
    """Save a bool tensor of any layout for backward, a bit per element, and nothing else."""
    flat, ctx.layout = flatten(mask)
    ctx.save_for_backward(ops.pack_bits(flat))


def save_range_mask(ctx: Any, x: Tensor, lower: float, upper: float) -> None:
    """Save where ``x``, of any layout, is neither at or below ``lower`` nor at or above ``upper``, as a mask."""
    flat, ctx.layout = flatten(x)
    ctx.save_for_backward(ops.range_bitmask(flat, lower, upper))


def saved_mask(ctx: Any) -> Tensor:
    """The mask that was saved."""
    (bits,) = ctx.saved_tensors
    return unflatten(ops.unpack_bits(bits, ctx.layout.numel), ctx.layout)


def apply_saved_mask(ctx: Any, grad: Tensor, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``grad`` where the mask that was saved is set, zeros elsewhere.

    ``backward``: PyTorch's operator that does so where a tensor is above zero, and says in which layout.
    """
    if is_traced() or is_mapped(grad):
        return torch.where(saved_mask(ctx), grad, 0)
    same_layout = memory_order(grad) == ctx.layout.order and is_dense_in_memory(grad)
    if torch.is_grad_enabled() or not same_layout:  # a second derivative is wanted, or another layout
        return backward(grad, saved_mask(ctx).to(grad.dtype))
    (bits,) = ctx.saved_tensors
    flat, layout = flatten(grad)
    kept = ops.apply_bitmask(flat, bits)
    return kept.view(grad.shape) if grad.is_contiguous() else unflatten(kept, layout)
