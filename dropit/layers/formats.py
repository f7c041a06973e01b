"""Shapes, memory formats and dtypes, as PyTorch's operators take or return them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropit.tracing import is_traced

_unsafe_view = torch.ops.aten._unsafe_view.default


def as_non_view(output: Tensor) -> Tensor:
    """Return ``output`` as no view of another tensor, as ``F.linear`` makes them: those may not be changed in place."""
    return _unsafe_view(output, output.shape)  # type: ignore[no-any-return]


def each(size: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number for each dimension, as PyTorch's functions take one for all."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


def save_form(ctx: Any, input: Tensor) -> None:
    """Remember the shape and the layout of ``input``, and none of its elements."""
    ctx.input_shape, ctx.memory_format = input.shape, suggest_memory_format(input)


def placeholder(ctx: Any, like: Tensor) -> Tensor:
    """A tensor of the form that :func:`save_form` saw, for operators that look at no more; dtype as ``like``."""
    return torch.empty(ctx.input_shape, dtype=like.dtype, device=like.device, memory_format=ctx.memory_format)


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """The format that PyTorch's operators take ``x`` to be in, told by its strides, with gaps or without."""
    order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())  # of channels_last, innermost first
    if order is None or 0 in x.shape or x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in order:
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(dim) * x.shape[dim]
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` laid out in that format, and so that operators take it for such, whatever dimensions are of size one."""
    if is_traced():
        return x.contiguous(memory_format=memory_format)
    if x.is_contiguous(memory_format=memory_format) and suggest_memory_format(x) == memory_format:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format).copy_(x)


# Of these is_autocast_enabled raises; is_autocast_available tells, but torch.compile does not follow it before 2.12.
_WITHOUT_AUTOCAST = ("meta", "vulkan")


def autocasts(device: str) -> bool:
    """Whether autocast is on for devices of that type."""
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast would make of the arguments of a Linear or Conv, done where autograd still sees it."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(_cast(tensor, dtype) for tensor in tensors)


def autocast_as(operator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast has it in for ``operator``, a pooling: told by its output of one element.

    Autocast does not know the operators behind it, which a layer calls, as they return more or have a backward.
    """
    device = x.device.type
    if x.dtype.itemsize > 2 or not autocasts(device):
        return x
    with torch.no_grad():
        one = operator(x.new_ones([1] * x.dim()))
    return in_dtype(x, one.dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return in_dtype(tensor, dtype)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself if it has the dtype: a compiler takes what ``to`` returns for another tensor."""
    return x if x.dtype is dtype else x.to(dtype)
