"""Convolutions and transposed convolutions, in one to three dimensions, whose input is packed for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.formats import autocast, each, placeholder, save_form
from dropit.layers.function import (
    LayerFunction,
    anchor,
    apply,
    first_order_only,
    none_for_none,
    undefined_gradients_as_none,
    wanted_gradients,
)
from dropit.layers.functions import Call, stands_in_for, wants_gradient
from dropit.layers.layer import DropITLayer
from dropit.layers.table import swap_class
from dropit.saved import Recipe
from dropit.saver import Saver
from dropit.tracing import is_mapped

# By the weight's dimensions.
_PLAIN = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_PLAIN_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class Geometry(NamedTuple):
    """Where a convolution's windows lie, in the order of ``torch.convolution``; the padding is with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.modules.conv._ConvNd, weight: Tensor, padding: Any, output_padding: Any = 0) -> Geometry:
        """What ``layer`` has now, which may have been set after construction, to one number for all dimensions."""
        dimensions = weight.dim() - 2
        stride, dilation = each(layer.stride, dimensions), each(layer.dilation, dimensions)
        extra = each(output_padding, dimensions)
        return cls(stride, each(padding, dimensions), dilation, layer.transposed, extra, layer.groups)


class DropITConvFunction(LayerFunction):
    """y = conv(x, W) + b. grad_input and grad_bias are exact; grad_weight is computed from x as it is restored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        anchor: Tensor | None,
        recipe: Recipe | None,
        of_weight: Recipe | None,
        count: int,
        *saved: Tensor | None,
    ) -> Tensor:
        """Compute the plain forward.

        ``recipe.restore`` of the first ``count`` of ``saved`` gives the input back, if grad_weight is wanted, and
        ``of_weight.restore`` of the others the weight, where that is computed from parameters.
        """
        return torch.convolution(input, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the weight and what restores the input."""
        undefined_gradients_as_none(ctx)
        input, weight, _, ctx.geometry, anchor, ctx.recipe, ctx.of_weight, ctx.count, *saved = inputs
        save_form(ctx, input)
        ctx.save_for_backward(weight if ctx.of_weight is None else None, anchor, *saved)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, out, *spatial). Returns grads of input (N, in, *spatial), weight and bias."""
        weight, anchor, *saved = ctx.saved_tensors
        wanted = wanted_gradients(ctx, 3)
        by_channels = wanted[1] and ctx.recipe.channels is not None and ctx.geometry.groups == 1
        of_input = wanted[1] and not by_channels
        # Of the input, grad_input needs the shape, and the layout for its own.
        input = ctx.recipe.restore(*saved[: ctx.count]) if of_input else placeholder(ctx, grad_output)
        through = weight if anchor is None else anchor
        if weight is None and (wanted[0] or wanted[1]):
            weight, through = ctx.of_weight.restore(*saved[ctx.count :]), grad_output
        mask = (wanted[0], of_input, wanted[2])
        grad_input, grad_weight, grad_bias = _gradients(grad_output, input, weight, ctx.geometry, mask)
        if by_channels:
            kept = ctx.recipe.restore_channels(*saved[: ctx.count])
            grad_weight = _grad_weight(grad_output, weight, ctx.geometry, *kept)
        if grad_weight is not None:
            grad_weight = first_order_only(grad_weight, through)
        if grad_input is not None and ctx.of_weight is not None:
            grad_input = first_order_only(grad_input, through)
        return grad_input, grad_weight, grad_bias, *[None] * (len(saved) + 5)


def _gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Those of input, weight and bias that the mask wants; None for the others."""
    if not (mask[0] or mask[1]):
        dims = [dim for dim in range(grad_output.dim()) if dim != 1]
        return [None, None, grad_output.sum(dims) if mask[2] else None]
    bias_shape = [grad_output.shape[1]]
    computed = torch.ops.aten.convolution_backward(grad_output, input, weight, bias_shape, *geometry, mask)
    # In one dimension PyTorch returns more than it is asked for.
    return [grad if wanted else None for grad, wanted in zip(computed, mask, strict=True)]


def _grad_weight(grad_output: Tensor, weight: Tensor, geometry: Geometry, kept: Tensor, channels: Tensor) -> Tensor:
    """The weight's gradient: nothing is computed of channels that were dropped whole, but zeros."""
    dim = 0 if geometry.transposed else 1
    of_kept = weight.narrow(dim, 0, kept.shape[1])  # whose form alone matters
    mask = (False, True, False)
    _, grad, _ = torch.ops.aten.convolution_backward(grad_output, kept, of_kept, None, *geometry, mask)
    zeros = torch.zeros_like(weight)
    return zeros.index_copy(dim, channels, grad) if is_mapped(grad) else zeros.index_copy_(dim, channels, grad)


def dropit_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, saver: Saver, *, role: str = "input"
) -> Tensor:
    """Compute ``torch.convolution``, and save for backward only what ``saver`` says of ``input`` ([N,] in, *spatial).

    With a frozen weight it saves nothing of the input, where PyTorch saves it whole. ``role``: as in dropit_linear.
    """
    if input.dim() < weight.dim():
        return dropit_conv(input.unsqueeze(0), weight, bias, geometry, saver, role=role).squeeze(0)
    if is_mapped(weight) or (not weight.requires_grad and _casts_once(input, bias)):
        return _plain_conv(input, weight, bias, geometry)
    x, w, b = autocast(input, weight, bias)
    if not weight.requires_grad:
        return apply(DropITConvFunction, x, w, b, geometry, None, None, None, 0)  # type: ignore[no-any-return]
    saved = saver.save(x, input, channel_dim=1, role=role)
    if saved is None:
        return _plain_conv(input, weight, bias, geometry)
    of_weight = saver.restorable(weight, w.dtype)
    return apply(  # type: ignore[no-any-return]
        DropITConvFunction,
        x,
        w,
        b,
        geometry,
        anchor(x),
        saved.recipe,
        of_weight and of_weight.recipe,
        len(saved.tensors),
        *saved.tensors,
        *(of_weight.tensors if of_weight else ()),
    )


def _casts_once(*tensors: Tensor | None) -> bool:
    """Whether autocast casts one of these for several calls, whose gradients are then added in the lower precision."""
    if all(cast is x for cast, x in zip(autocast(*tensors), tensors, strict=True)):
        return False
    return any(x is not None and x.is_leaf and x.requires_grad for x in tensors)


def _plain_conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """By the function that the plain layer calls, so that autocast and autograd see no difference."""
    stride, padding, dilation, transposed, extra, groups = geometry
    if transposed:
        plain: Any = _PLAIN_TRANSPOSE[weight.dim()]
        return plain(input, weight, bias, stride, padding, extra, groups, dilation)  # type: ignore[no-any-return]
    plain = _PLAIN[weight.dim()]
    return plain(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def is_usual(input: Tensor, weight: Tensor) -> bool:
    """Whether the numbers are real and the dimensions fit; PyTorch has a way, or an error, for what is not."""
    return weight.is_floating_point() and weight.dim() - input.dim() in (0, 1)


class _DropITConv(DropITLayer, nn.modules.conv._ConvNd):
    drops_input = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, in_channels, *spatial) or (in_channels, *spatial)."""
        # Each is read once: a parametrization computes it, and may go on with each reading.
        weight, bias = self.weight, self.bias
        if not self.dropit_is_active(input=input) or not is_usual(input, weight) or "_conv_forward" in self.__dict__:
            return self._conv_forward(input, weight, bias)  # which may be replaced on the module, to pad in another way
        if not weight.requires_grad and _casts_once(input, bias):
            return self._conv_forward(input, weight, bias)
        if self.padding == "same" and _casts_once(input):  # padded first, it would be cast in each call
            return self._conv_forward(input, weight, bias)
        if self.padding == "same" and any(step != 1 for step in each(self.stride, 1)):
            return self._conv_forward(input, weight, bias)  # PyTorch's error
        padded, padding = self._pad(input, weight)
        return dropit_conv(padded, weight, bias, Geometry.of(self, weight, padding), self._dropit_saver)

    def _pad(self, input: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        """Pad first where the convolution cannot: with other than zeros, or by one more on one side ('same').

        Returns the input and the padding that is left to the convolution. Reads what PyTorch reads, when PyTorch does:
        padding and dilation may be set after construction, where what is made of them then is not.
        """
        if self.padding_mode != "zeros":
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        if not isinstance(self.padding, str):
            return input, self.padding
        if self.padding == "valid":
            return input, 0
        dilation = each(self.dilation, weight.dim() - 2)
        total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(size % 2 for size in total):
            after = [(0, size % 2) for size in reversed(total)]
            input = F.pad(input, [size for pair in after for size in pair])
        return input, [size // 2 for size in total]


class _DropITConvTranspose(DropITLayer, nn.modules.conv._ConvTransposeNd):
    drops_input = True

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """input: (N, in_channels, *spatial) or (in_channels, *spatial)."""
        if not self.dropit_is_active(input=input):
            return super().forward(input, output_size)  # type: ignore[misc, no-any-return]
        weight, bias = self.weight, self.bias  # read once
        dimensions = weight.dim() - 2
        sizes = (self.stride, self.padding, self.kernel_size)
        extra = self._output_padding(input, output_size, *sizes, dimensions, self.dilation)  # type: ignore[arg-type]
        if not is_usual(input, weight):
            plain: Any = _PLAIN_TRANSPOSE[weight.dim()]
            return plain(input, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)  # type: ignore[no-any-return]
        return dropit_conv(input, weight, bias, Geometry.of(self, weight, self.padding, extra), self._dropit_saver)


DropITConv1d, DropITConv2d, DropITConv3d = (
    swap_class(_DropITConv, plain) for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
)
DropITConvTranspose1d, DropITConvTranspose2d, DropITConvTranspose3d = (
    swap_class(_DropITConvTranspose, plain) for plain in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)


@stands_in_for("conv1d", "conv2d", "conv3d", unquantized=True)
def _conv(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not wants_gradient(input, weight, bias) or not is_usual(input, weight) or isinstance(padding, str):
        return NotImplemented
    count = weight.dim() - 2
    geometry = Geometry(each(stride, count), each(padding, count), each(dilation, count), False, (0,) * count, groups)
    return dropit_conv(input, weight, bias, geometry, call.saver, role=call.role("input"))
