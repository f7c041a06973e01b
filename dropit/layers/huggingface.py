"""Hugging Face's Conv1D, a Linear with a transposed weight, and its activations. Imported when a model has one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import GELUActivation, NewGELUActivation, QuickGELUActivation
from transformers.pytorch_utils import Conv1D

from dropit.layers.activation import DropITActivation
from dropit.layers.layer import PackedInputLayer
from dropit.layers.linear import dropit_linear
from dropit.layers.table import register


@register
class DropITConv1D(PackedInputLayer, Conv1D):
    """transformers' Conv1D with a packed input."""

    plain = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., nx). Returns (..., nf)."""
        if not self.saves(input=x):
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_linear(x, self.weight.t(), self.bias, self._dropit_packer)  # each is read once


@register
class DropITGELUActivation(DropITActivation, GELUActivation):
    """transformers' GELU that keeps 16, 8 or 4 bits per element, unless it is the one written in Python."""

    plain = GELUActivation

    @property
    def curve(self) -> str | None:  # type: ignore[override]
        """GELU, where the function is PyTorch's."""
        return "gelu" if self.act is F.gelu else None


@register
class DropITNewGELUActivation(DropITActivation, NewGELUActivation):
    """GPT-2's GELU by tanh that keeps 16, 8 or 4 bits per element."""

    plain = NewGELUActivation
    curve = "new_gelu"


@register
class DropITQuickGELUActivation(DropITActivation, QuickGELUActivation):
    """CLIP's GELU by the logistic function that keeps 16, 8 or 4 bits per element."""

    plain = QuickGELUActivation
    curve = "quick_gelu"
