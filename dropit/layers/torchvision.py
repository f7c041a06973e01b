"""torchvision's own normalization, ConvNeXt's. Imported when a model has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.convnext import LayerNorm2d

from dropit.layers.layer import DropITLayer
from dropit.layers.norm import dropit_layer_norm_2d
from dropit.layers.table import register


@register
class DropITLayerNorm2d(DropITLayer, LayerNorm2d):  # type: ignore[misc]
    """LayerNorm over channels that saves 16 to 2 bits per element."""

    plain = LayerNorm2d
    quantizes = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.saves(x):
            return super().forward(x)  # type: ignore[no-any-return]
        layer: Any = self  # of torchvision, which has no types
        return dropit_layer_norm_2d(x, layer, self._dropit_saver)
