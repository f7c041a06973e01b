"""The layers that swap in, one family a file, and the table of what is swapped for what."""

from torch import nn

from dropit.layers.attention import DropITMultiheadAttention
from dropit.layers.conv import (
    DropITConv1d,
    DropITConv2d,
    DropITConv3d,
    DropITConvTranspose1d,
    DropITConvTranspose2d,
    DropITConvTranspose3d,
)
from dropit.layers.dropout import DropITDropout
from dropit.layers.layer import DropITLayer, LosslessLayer, PackedInputLayer
from dropit.layers.linear import DropITLinear
from dropit.layers.pool import DropITMaxPool1d, DropITMaxPool2d, DropITMaxPool3d
from dropit.layers.relu import DropITHardtanh, DropITLeakyReLU, DropITReLU, DropITReLU6

SWAPS: dict[type[nn.Module], type[DropITLayer]] = {
    layer.plain: layer
    for layer in (
        DropITLinear,
        DropITConv1d,
        DropITConv2d,
        DropITConv3d,
        DropITConvTranspose1d,
        DropITConvTranspose2d,
        DropITConvTranspose3d,
        DropITMultiheadAttention,
        DropITReLU,
        DropITReLU6,
        DropITHardtanh,
        DropITLeakyReLU,
        DropITMaxPool1d,
        DropITMaxPool2d,
        DropITMaxPool3d,
        DropITDropout,
    )
}

__all__ = ["SWAPS", "DropITLayer", "LosslessLayer", "PackedInputLayer"]
