"""timm's own normalization, activations and weight-standardized convolution. Imported when a model has one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers.activations import GELU, GELUTanh
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor

from dropit.layers.activation import DropITActivation
from dropit.layers.conv import Geometry, dropit_conv, is_usual
from dropit.layers.layer import PackedInputLayer, QuantizedLayer
from dropit.layers.norm import dropit_batch_norm, dropit_layer_norm, dropit_layer_norm_2d, has_batches
from dropit.layers.table import register


@register
class DropITLayerNorm(QuantizedLayer, LayerNorm):
    """timm's LayerNorm that keeps 16, 8 or 4 bits per element."""

    plain = LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        if not self.packs(x) or self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_layer_norm(x, self, self._dropit_packer)


@register
class DropITLayerNorm2d(QuantizedLayer, LayerNorm2d):
    """timm's LayerNorm over channels that keeps 16, 8 or 4 bits per element."""

    plain = LayerNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.packs(x) or self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_layer_norm_2d(x, self, self._dropit_packer)


@register
class DropITBatchNormAct2d(QuantizedLayer, BatchNormAct2d):
    """timm's BatchNorm with an activation, which is a layer of its own, that keeps 16, 8 or 4 bits per element."""

    plain = BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.packs(x) or x.dim() != 4 or not has_batches(x):
            return super().forward(x)  # type: ignore[no-any-return]
        return self.act(self.drop(dropit_batch_norm(x, self, self._dropit_packer)))  # type: ignore[no-any-return]


@register
class DropITScaledStdConv2d(PackedInputLayer, ScaledStdConv2d):
    """timm's convolution with a standardized weight, with a packed input."""

    plain = ScaledStdConv2d

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W)."""
        if not self.saves(input=x):
            return super().forward(x)  # type: ignore[no-any-return]
        # Each is read as often as by timm, and in its order: a parametrization may go on with each reading.
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=self.eps)
        weight, bias = weight.reshape_as(self.weight), self.bias
        if isinstance(self.padding, str) or not is_usual(x, weight):
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        return dropit_conv(x, weight, bias, Geometry.of(self, weight, self.padding), self._dropit_packer)


@register
class DropITGELU(DropITActivation, GELU):
    """timm's GELU that keeps 16, 8 or 4 bits per element."""

    plain = GELU
    curve: Any = "gelu"


@register
class DropITGELUTanh(DropITActivation, GELUTanh):
    """timm's GELU by tanh that keeps 16, 8 or 4 bits per element."""

    plain = GELUTanh
    curve: Any = "gelu_tanh"
