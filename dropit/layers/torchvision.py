"""torchvision's own normalization, ConvNeXt's. Imported when a model has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.convnext import LayerNorm2d

from dropit.layers.layer import QuantizedLayer
from dropit.layers.norm import dropit_layer_norm
from dropit.layers.table import register


@register
class DropITLayerNorm2d(QuantizedLayer, LayerNorm2d):  # type: ignore[misc]
    """LayerNorm over channels that keeps 8 or 4 bits per element."""

    plain = LayerNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.packs(x):
            return super().forward(x)  # type: ignore[no-any-return]
        layer: Any = self
        last = x.permute(0, 2, 3, 1)
        y = dropit_layer_norm(last, layer.normalized_shape, layer.weight, layer.bias, layer.eps, self.packer)
        return y.permute(0, 3, 1, 2)
