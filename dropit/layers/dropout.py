"""nn.Dropout that saves its mask at one bit per element; the random numbers and the gradients are PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dropit.layers.function import LayerFunction, apply, none_for_none, undefined_gradients_as_none
from dropit.layers.functions import Call, are_dense, stands_in_for
from dropit.layers.layer import DropITLayer
from dropit.layers.masks import save_mask, saved_mask
from dropit.layers.table import register


class DropITDropoutFunction(LayerFunction):
    """y = x * mask / (1 - p)."""

    @staticmethod
    def forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The output, and the mask (bool) that PyTorch would have drawn."""
        if input.is_cuda or torch.compiler.is_compiling():  # compiled, what plain dropout becomes on any device
            return torch.native_dropout(input, p, True)
        noise = torch.empty_like(input).bernoulli_(1 - p)
        return input * noise.div(1 - p), noise.to(torch.bool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save the mask's bits."""
        undefined_gradients_as_none(ctx)
        _, ctx.p = inputs
        mask = output[1]
        ctx.mark_non_differentiable(mask)
        save_mask(ctx, mask)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The gradient through the kept elements."""
        mask, keep = saved_mask(ctx), 1 - ctx.p
        if grad_output.is_cuda:
            return torch.ops.aten.native_dropout_backward(grad_output, mask, 1 / keep), None
        # The factor as PyTorch rounds it on the CPU: in the tensor's precision.
        return grad_output * (mask * grad_output.new_ones(()).div(keep)), None


@register
class DropITDropout(DropITLayer, nn.Dropout):
    """nn.Dropout that saves a bit per element."""

    plain = nn.Dropout

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape."""
        if self.p == 0:
            return input  # as F.dropout does; a compiler would take what that returns for another tensor
        if not self.saves(input) or self.inplace or self.p == 1:
            return super().forward(input)
        output, _ = apply(DropITDropoutFunction, input, self.p)
        return output  # type: ignore[no-any-return]


@stands_in_for("dropout", unquantized=True)
def _dropout(call: Call, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not are_dense(input) or not 0 <= p <= 1:
        return NotImplemented
    if p == 0 or not training:
        return input
    if inplace or p == 1 or not input.requires_grad:
        return NotImplemented
    return apply(DropITDropoutFunction, input, p)[0]
