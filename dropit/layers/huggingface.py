"""Hugging Face's Conv1D, a Linear with a transposed weight, and its activations. Imported when a model has one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import GELUActivation, NewGELUActivation, QuickGELUActivation
from transformers.pytorch_utils import Conv1D

from dropit.layers.activation import DropITActivation
from dropit.layers.layer import DropITLayer
from dropit.layers.linear import dropit_linear
from dropit.layers.table import register, swap_class


@register
class DropITConv1D(DropITLayer, Conv1D):
    """transformers' Conv1D with a packed input."""

    plain = Conv1D
    drops_input = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., nx). Returns (..., nf)."""
        if not self.dropit_is_active(input=x):
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_linear(x, self.weight.t(), self.bias, self._dropit_saver)  # each is read once


class _DropITGELUActivation(DropITActivation):
    @property
    def curve(self) -> str | None:  # type: ignore[override]
        """GELU, unless the module computes it by a formula written in Python."""
        return "gelu" if self.act is F.gelu else None


DropITGELUActivation = swap_class(_DropITGELUActivation, GELUActivation)
DropITNewGELUActivation = swap_class(DropITActivation, NewGELUActivation, curve="new_gelu", __module__=__name__)
DropITQuickGELUActivation = swap_class(DropITActivation, QuickGELUActivation, curve="quick_gelu", __module__=__name__)
