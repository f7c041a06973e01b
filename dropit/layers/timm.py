"""timm's own normalization, activations and weight-standardized convolution. Imported when a model has one."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.activations import GELU, GELUTanh
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor

from dropit.layers.activation import DropITActivation
from dropit.layers.conv import Geometry, dropit_conv, is_usual
from dropit.layers.layer import DropITLayer
from dropit.layers.norm import dropit_batch_norm, dropit_layer_norm, dropit_layer_norm_2d, has_batches
from dropit.layers.table import register, swap_class


@register
class DropITLayerNorm(DropITLayer, LayerNorm):
    """timm's LayerNorm that saves 16 to 2 bits per element."""

    plain = LayerNorm
    quantizes = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C)."""
        if not self.saves(x) or self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_layer_norm(x, self, self._dropit_saver)


@register
class DropITLayerNorm2d(DropITLayer, LayerNorm2d):
    """timm's LayerNorm over channels that saves 16 to 2 bits per element."""

    plain = LayerNorm2d
    quantizes = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.saves(x) or self._fast_norm:
            return super().forward(x)  # type: ignore[no-any-return]
        return dropit_layer_norm_2d(x, self, self._dropit_saver)


@register
class DropITBatchNormAct2d(DropITLayer, BatchNormAct2d):
    """timm's BatchNorm with an activation, which is a layer of its own, that saves 16 to 2 bits per element."""

    plain = BatchNormAct2d
    quantizes = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if not self.saves(x) or x.dim() != 4 or not has_batches(x):
            return super().forward(x)  # type: ignore[no-any-return]
        return self.act(self.drop(dropit_batch_norm(x, self, self._dropit_saver)))  # type: ignore[no-any-return]


@register
class DropITScaledStdConv2d(DropITLayer, ScaledStdConv2d):
    """timm's convolution with a standardized weight, with a packed input."""

    plain = ScaledStdConv2d
    drops_input = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W)."""
        if not self.dropit_is_active(input=x):
            return super().forward(x)  # type: ignore[no-any-return]
        # Each is read as often as by timm, and in its order: a parametrization may go on with each reading.
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=self.eps)
        weight, bias = weight.reshape_as(self.weight), self.bias
        if isinstance(self.padding, str) or not is_usual(x, weight):
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        return dropit_conv(x, weight, bias, Geometry.of(self, weight, self.padding), self._dropit_saver)


DropITGELU = swap_class(DropITActivation, GELU, curve="gelu", __module__=__name__)
DropITGELUTanh = swap_class(DropITActivation, GELUTanh, curve="gelu_tanh", __module__=__name__)
