"""Max-pooling that saves, of its input and indices, only which element of each window was largest."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit import ops
from dropit.layers.formats import autocast_as, each, placeholder, save_form, suggest_memory_format
from dropit.layers.function import LayerFunction, apply, link_to, none_for_none, undefined_gradients_as_none, with_zeros
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import swap_class
from dropit.packed import Layout, layout_of, unflatten
from dropit.rematerialize import Memo
from dropit.tracing import is_mapped, is_plain

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

    @classmethod
    def of(cls, count: int, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Windows:
        """Return them for ``count`` dimensions, from what PyTorch's functions and layers take."""
        stride = size if stride is None or stride == () else stride
        return cls(each(size, count), each(stride, count), each(padding, count), each(dilation, count), ceil_mode)


class DropITMaxPoolFunction(LayerFunction):
    """The largest of each window. Saves its offset in the window, in the fewest of 1, 2, 4 or 8 bits."""

    @staticmethod
    def forward(input: Tensor, windows: Windows, link: tuple[Tensor] | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The output, and the offsets; or int64 indices into the input's spatial dimensions, where those do not do."""
        output, indices = _FORWARD[len(windows.kernel_size)](input, *windows)
        offsets = window_offsets(indices, input.shape, windows)
        # Of a window that is all -inf, PyTorch's index on a CPU is of another one in this case.
        odd = (
            len(windows.kernel_size) == 3 and suggest_memory_format(input) is torch.channels_last_3d and is_plain(input)
        )
        if odd and not torch.equal(input_indices(offsets, input.shape, windows), indices):
            return output, indices
        return output, ops.pack_subbyte(_flat(offsets, layout_of(output)), _size(windows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the offsets."""
        undefined_gradients_as_none(ctx)
        input, ctx.windows, ctx.link = inputs
        pooled, stored = output
        ctx.mark_non_differentiable(stored)
        save_form(ctx, input)
        ctx.layout = layout_of(pooled)
        ctx.save_for_backward(stored)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Each window's gradient, at its largest element."""
        (stored,) = ctx.saved_tensors
        indices = _indices(stored, ctx.layout, ctx.input_shape, ctx.windows)
        backward = _BACKWARD[len(ctx.windows.kernel_size)]
        grad_input = backward(grad_output, placeholder(ctx, grad_output), *ctx.windows, indices)
        return with_zeros(grad_input, ctx.link), None, None


def dropit_max_pool(input: Tensor, windows: Windows, memo: Memo) -> Tensor:
    """Compute max-pooling of ([N,] C, *spatial), and save an offset per window."""
    count = len(windows.kernel_size)
    input = autocast_as(partial(_PLAIN[count], kernel_size=1), input)
    if count == 1:  # is two, as PyTorch has it
        size, stride, padding, dilation, ceil_mode = windows
        flat = Windows((1, *size), (1, *stride), (0, *padding), (1, *dilation), ceil_mode)
        return dropit_max_pool(input.unsqueeze(-2), flat, memo).squeeze(-2)
    published = memo.published(input)
    output, stored = apply(DropITMaxPoolFunction, input, windows, link_to(input))
    again = partial(_again, layout_of(output), windows)
    return memo.publish(output, published and published.map("max pool", again, stored))


def _again(layout: Layout, windows: Windows, x: Tensor, stored: Tensor) -> Tensor:
    """The largest elements again, of what is restored of the input: a tenth of the time of looking for them."""
    spatial = len(windows.kernel_size)
    indices = _indices(stored, layout, x.shape, windows)
    found = x.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view(layout.shape)
    return unflatten(_flat(found, layout), layout)


def _flat(x: Tensor, layout: Layout) -> Tensor:
    return x.permute(layout.order).reshape(-1)


def _indices(stored: Tensor, layout: Layout, input_shape: Sequence[int], windows: Windows) -> Tensor:
    """What PyTorch's pooling returns, of what is stored of it for an output of that layout."""
    if stored.dtype is torch.int64:
        return stored
    offsets = ops.unpack_subbyte(stored, _size(windows), layout.numel)
    return input_indices(unflatten(offsets, layout), input_shape, windows)


def window_offsets(indices: Tensor, input_shape: Sequence[int], windows: Windows) -> Tensor:
    """Indices into the input's spatial dimensions (int64) as offsets in each window (uint8), row by row."""
    starts, offset_at, _ = _tables(indices, input_shape, windows)
    distances = (indices - starts).clamp_(0, len(offset_at) - 1)
    return offset_at.take(distances)


def input_indices(offsets: Tensor, input_shape: Sequence[int], windows: Windows) -> Tensor:
    """Undo :func:`window_offsets`: int64."""
    starts, _, distance_of = _tables(offsets, input_shape, windows)
    return distance_of.take(offsets.to(torch.int64)) + starts  # half the time of an index


def _tables(output: Tensor, input_shape: Sequence[int], windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """How indices and offsets belong together, for what has the shape of ``output``.

    The index of each window's first element, which padding may put below 0: (*spatial), int64. By how far an element's
    index is beyond it, the offset (uint8); and by offset, how far: (windows' elements,) int64. Of two offsets that are
    equally far, where a window is wider than the input, either gives the index back.
    """
    spatial = len(windows.kernel_size)
    arguments = (tuple(output.shape[-spatial:]), tuple(input_shape[-spatial:]), windows, output.device)
    return (_kept_tables if is_plain(output) else _new_tables)(*arguments)


def _new_tables(
    shape: tuple[int, ...], input_shape: tuple[int, ...], windows: Windows, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    starts = distance_of = torch.zeros((), dtype=torch.int64, device=device)
    farthest = 0
    for dim, size in enumerate(input_shape):
        count, kernel = shape[dim], windows.kernel_size[dim]
        first = torch.arange(count, device=device) * windows.stride[dim] - windows.padding[dim]
        starts = starts.unsqueeze(-1) * size + first
        distance_of = distance_of.unsqueeze(-1) * size + torch.arange(kernel, device=device) * windows.dilation[dim]
        farthest = farthest * size + (kernel - 1) * windows.dilation[dim]
    distance_of = distance_of.reshape(-1)
    offsets = torch.arange(_size(windows), device=device).to(torch.uint8)
    offset_at = torch.zeros(farthest + 1, dtype=torch.uint8, device=device).index_copy(0, distance_of, offsets)
    return starts, offset_at, distance_of


_kept_tables = functools.lru_cache(64)(_new_tables)


def _size(windows: Windows) -> int:
    return math.prod(windows.kernel_size)


class _DropITMaxPool(DropITLayer, nn.modules.pooling._MaxPoolNd):
    dimensions: int

    def forward(self, input: Tensor) -> Any:
        """input: (N, C, *spatial) or (C, *spatial)."""
        given = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        windows = Windows.of(self.dimensions, *given)
        if not self.saves(input) or self.return_indices or _size(windows) > 256 or is_mapped(input):
            return self.pass_on_unsaved(super().forward, input)  # type: ignore[misc]
        return dropit_max_pool(input, windows, self._dropit_memo)


DropITMaxPool1d, DropITMaxPool2d, DropITMaxPool3d = (
    swap_class(_DropITMaxPool, plain, dimensions=dimensions)
    for dimensions, plain in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), start=1)
)


def _enter(count: int) -> None:
    @stands_in_for(f"max_pool{count}d", unquantized=True)
    def called(
        call: Call,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        fits = not return_indices and wants_gradient(input) and input.dim() in (count + 1, count + 2)
        windows = Windows.of(count, kernel_size, stride, padding, dilation, ceil_mode)
        return dropit_max_pool(input, windows, call.saver.memo) if fits and _size(windows) <= 256 else NotImplemented


for _count in _PLAIN:
    _enter(_count)
