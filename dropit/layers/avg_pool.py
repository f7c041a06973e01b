"""Average pooling that saves nothing: its gradient needs the input's shape only, where PyTorch saves the input."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.formats import autocast_as, each, placeholder, save_form
from dropit.layers.function import LayerFunction, apply, link_to, none_for_none, undefined_gradients_as_none, with_zeros
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import swap_class
from dropit.tracing import is_mapped

_aten = torch.ops.aten
_PLAIN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_FORWARD = {2: _aten.avg_pool2d, 3: _aten.avg_pool3d}
_BACKWARD = {2: _aten.avg_pool2d_backward, 3: _aten.avg_pool3d_backward}
_ADAPTIVE_PLAIN = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_ADAPTIVE_FORWARD = {2: _aten._adaptive_avg_pool2d, 3: _aten._adaptive_avg_pool3d}
_ADAPTIVE_BACKWARD = {2: _aten._adaptive_avg_pool2d_backward, 3: _aten._adaptive_avg_pool3d_backward}


class DropITAvgPoolFunction(LayerFunction):
    """y = the means of windows of x."""

    @staticmethod
    def forward(input: Tensor, windows: tuple[Any, ...], link: tuple[Tensor] | None) -> Tensor:  # type: ignore[override]
        """The plain forward; ``windows`` are the further arguments of PyTorch's operator, the window's size first."""
        return _FORWARD[len(windows[0])](input, *windows)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember the input's shape."""
        undefined_gradients_as_none(ctx)
        input, ctx.windows, ctx.link = inputs
        save_form(ctx, input)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Each window's gradient, spread over its elements."""
        grad_input = _BACKWARD[len(ctx.windows[0])](grad_output, placeholder(ctx, grad_output), *ctx.windows)
        return with_zeros(grad_input, ctx.link), None, None


class DropITAdaptiveAvgPoolFunction(LayerFunction):
    """y = the means of ``sizes`` windows of x."""

    @staticmethod
    def forward(input: Tensor, sizes: list[int], link: tuple[Tensor] | None) -> Tensor:  # type: ignore[override]
        """The plain forward."""
        return _ADAPTIVE_FORWARD[len(sizes)](input, sizes)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember the input's shape."""
        undefined_gradients_as_none(ctx)
        input, sizes, ctx.link = inputs
        ctx.dimensions = len(sizes)
        save_form(ctx, input)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Each window's gradient, spread over its elements."""
        grad_input = _ADAPTIVE_BACKWARD[ctx.dimensions](grad_output, placeholder(ctx, grad_output))
        return with_zeros(grad_input, ctx.link), None, None


def dropit_avg_pool(
    input: Tensor,
    count: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Compute average pooling of ([N,] C, *spatial) over the last ``count`` dimensions, and save nothing."""
    input = autocast_as(partial(_PLAIN[count], kernel_size=1), input)  # type: ignore[operator]
    stride = kernel_size if stride is None or stride == () else stride
    sizes = [list(each(size, count)) for size in (kernel_size, stride, padding)]
    rest = (ceil_mode, count_include_pad, divisor_override)
    if count > 1:
        return apply(DropITAvgPoolFunction, input, (*sizes, *rest), link_to(input))  # type: ignore[no-any-return]
    # One dimension is two, as PyTorch has it.
    flat = [[neutral, *size] for neutral, size in zip((1, 1, 0), sizes, strict=True)]
    input = input.unsqueeze(-2)
    return apply(DropITAvgPoolFunction, input, (*flat, *rest), link_to(input)).squeeze(-2)  # type: ignore[no-any-return]


class _DropITAvgPool(DropITLayer, nn.modules.pooling._AvgPoolNd):
    dimensions: int

    def forward(self, input: Tensor) -> Any:
        """input: (N, C, *spatial) or (C, *spatial)."""
        if not self.saves(input) or is_mapped(input):
            return super().forward(input)  # type: ignore[misc]
        rest: Any = (self.ceil_mode, self.count_include_pad, getattr(self, "divisor_override", None))
        return dropit_avg_pool(input, self.dimensions, self.kernel_size, self.stride, self.padding, *rest)


class _DropITAdaptiveAvgPool(DropITLayer, nn.modules.pooling._AdaptiveAvgPoolNd):
    dimensions: int

    def forward(self, input: Tensor) -> Any:
        """input: (N, C, *spatial) or (C, *spatial)."""
        sizes = self._sizes(input)
        mean = all(size == 1 for size in sizes)  # which saves nothing
        if not self.saves(input) or mean or is_mapped(input):
            return super().forward(input)  # type: ignore[misc]
        input = autocast_as(partial(_ADAPTIVE_PLAIN[self.dimensions], output_size=1), input)
        if self.dimensions > 1:
            return apply(DropITAdaptiveAvgPoolFunction, input, sizes, link_to(input))
        input = input.unsqueeze(-2)
        return apply(DropITAdaptiveAvgPoolFunction, input, [1, *sizes], link_to(input)).squeeze(-2)

    def _sizes(self, input: Tensor) -> list[int]:
        one = isinstance(self.output_size, int) or self.output_size is None
        given: Any = [self.output_size] * self.dimensions if one else self.output_size
        spatial = input.shape[-self.dimensions :]
        return [size if wanted is None else wanted for wanted, size in zip(given, spatial, strict=True)]


DropITAvgPool1d, DropITAvgPool2d, DropITAvgPool3d = (
    swap_class(_DropITAvgPool, plain, dimensions=dimensions)
    for dimensions, plain in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), start=1)
)
DropITAdaptiveAvgPool1d, DropITAdaptiveAvgPool2d, DropITAdaptiveAvgPool3d = (
    swap_class(_DropITAdaptiveAvgPool, plain, dimensions=dimensions)
    for dimensions, plain in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), start=1)
)


def _enter(count: int) -> None:
    @stands_in_for(f"avg_pool{count}d", unquantized=True)
    def called(call: Call, input: Any, *args: Any, **kwargs: Any) -> Any:
        fits = wants_gradient(input) and input.dim() in (count + 1, count + 2)
        return dropit_avg_pool(input, count, *args, **kwargs) if fits else NotImplemented


for _count in _PLAIN:
    _enter(_count)
