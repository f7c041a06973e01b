"""Hugging Face's Conv1D, GPT-2's Linear with a transposed weight. Imported when a model has one."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dropit.layers.layer import PackedInputLayer
from dropit.layers.linear import dropit_linear
from dropit.layers.table import register


@register
class DropITConv1D(PackedInputLayer, Conv1D):
    """transformers' Conv1D with a packed input."""

    plain = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., nx). Returns (..., nf)."""
        if not self.packs(self.weight):
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_linear(x, self.weight.t(), self.bias, self.packer)
