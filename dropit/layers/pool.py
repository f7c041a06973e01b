"""Max-pooling that saves, of its input and indices, only which element of each window was largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit import ops
from dropit.layers.formats import autocast_as, each, placeholder, save_form
from dropit.layers.function import LayerFunction, link_to, none_for_none, undefined_gradients_as_none, with_zeros
from dropit.layers.layer import DropITLayer
from dropit.layers.table import swap_class
from dropit.packed import flatten, unflatten
from dropit.rematerialize import Memo

_PLAIN = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_FORWARD = {2: torch.ops.aten.max_pool2d_with_indices, 3: torch.ops.aten.max_pool3d_with_indices}
_BACKWARD = {2: torch.ops.aten.max_pool2d_with_indices_backward, 3: torch.ops.aten.max_pool3d_with_indices_backward}


class Windows(NamedTuple):
    """Where the windows lie, in the order of PyTorch's pooling functions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


class DropITMaxPoolFunction(LayerFunction):
    """The largest of each window. Saves its offset in the window, in the fewest of 1, 2, 4 or 8 bits."""

    @staticmethod
    def forward(input: Tensor, windows: Windows, link: tuple[Tensor] | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The output, and int64 indices into the input's spatial dimensions."""
        output, indices = _FORWARD[len(windows.kernel_size)](input, *windows)
        return output, indices

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the offsets."""
        undefined_gradients_as_none(ctx)
        input, ctx.windows, ctx.link = inputs
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        save_form(ctx, input)
        offsets = window_offsets(indices, input.shape, ctx.windows)
        flat, ctx.layout = flatten(offsets)
        ctx.save_for_backward(ops.pack_subbyte(flat, _size(ctx.windows)))

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Each window's gradient, at its largest element."""
        (packed,) = ctx.saved_tensors
        offsets = ops.unpack_subbyte(packed, _size(ctx.windows), ctx.layout.numel)
        indices = input_indices(unflatten(offsets, ctx.layout), ctx.input_shape, ctx.windows)
        backward = _BACKWARD[len(ctx.windows.kernel_size)]
        grad_input = backward(grad_output, placeholder(ctx, grad_output), *ctx.windows, indices)
        return with_zeros(grad_input, ctx.link), None, None


def dropit_max_pool(input: Tensor, windows: Windows, memo: Memo) -> Tensor:
    """Compute max-pooling of ([N,] C, *spatial), and save an offset per window."""
    published = memo.published(input)
    output = DropITMaxPoolFunction.apply(input, windows, link_to(input))[0]
    return memo.publish(output, published and published.map("max pool", partial(_again, windows)))


def _again(windows: Windows, x: Tensor) -> Tensor:
    return _FORWARD[len(windows.kernel_size)](x, *windows)[0]  # type: ignore[no-any-return]


def window_offsets(indices: Tensor, input_shape: Sequence[int], windows: Windows) -> Tensor:
    """Indices into the input's spatial dimensions (int64) as offsets in each window (uint8), row by row."""
    offsets, rest = torch.zeros_like(indices), indices
    factor = 1
    for dim in reversed(range(len(windows.kernel_size))):
        size = input_shape[dim - len(windows.kernel_size)]
        place = rest % size - _window_starts(indices, dim, windows)
        offsets = offsets + place.div(windows.dilation[dim], rounding_mode="floor") * factor
        rest = rest.div(size, rounding_mode="floor")
        factor *= windows.kernel_size[dim]
    return offsets.to(torch.uint8)


def input_indices(offsets: Tensor, input_shape: Sequence[int], windows: Windows) -> Tensor:
    """Undo :func:`window_offsets`: int64."""
    rest = offsets.to(torch.int64)
    indices = torch.zeros_like(rest)
    factor = 1
    for dim in reversed(range(len(windows.kernel_size))):
        place = _window_starts(offsets, dim, windows) + rest % windows.kernel_size[dim] * windows.dilation[dim]
        indices = indices + place * factor
        rest = rest.div(windows.kernel_size[dim], rounding_mode="floor")
        factor *= input_shape[dim - len(windows.kernel_size)]
    return indices


def _window_starts(like: Tensor, dim: int, windows: Windows) -> Tensor:
    """Where the windows begin along one spatial dimension, shaped to broadcast over ``like``'s."""
    trailing = len(windows.kernel_size) - dim
    count = like.shape[-trailing]
    starts = torch.arange(count, device=like.device) * windows.stride[dim] - windows.padding[dim]
    return starts.view(count, *[1] * (trailing - 1))


def _size(windows: Windows) -> int:
    return math.prod(windows.kernel_size)


class _DropITMaxPool(DropITLayer, nn.modules.pooling._MaxPoolNd):
    dimensions: int

    def forward(self, input: Tensor) -> Any:
        """input: (N, C, *spatial) or (C, *spatial)."""
        windows = self._windows()
        if not self.saves(input) or self.return_indices or _size(windows) > 256:
            return self.pass_on_unsaved(super().forward, input)  # type: ignore[misc]
        input = autocast_as(partial(_PLAIN[self.dimensions], kernel_size=1), input)
        if self.dimensions > 1:
            return dropit_max_pool(input, windows, self._dropit_memo)
        # One dimension is two, as PyTorch has it.
        flat = Windows((1, *windows[0]), (1, *windows[1]), (0, *windows[2]), (1, *windows[3]), self.ceil_mode)
        return dropit_max_pool(input.unsqueeze(-2), flat, self._dropit_memo).squeeze(-2)

    def _windows(self) -> Windows:
        count, stride = self.dimensions, self.kernel_size if self.stride is None else self.stride
        sizes = (
            each(self.kernel_size, count),
            each(stride, count),
            each(self.padding, count),
            each(self.dilation, count),
        )
        return Windows(*sizes, self.ceil_mode)


DropITMaxPool1d, DropITMaxPool2d, DropITMaxPool3d = (
    swap_class(_DropITMaxPool, plain, dimensions=dimensions)
    for dimensions, plain in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), start=1)
)
