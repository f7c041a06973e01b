"""The layers that swap in, one family a file, and the table of what is swapped for what."""

from torch import nn

from dropit.layers.conv import DropITConv2d
from dropit.layers.layer import DropITLayer
from dropit.layers.linear import DropITLinear

SWAPS: dict[type[nn.Module], type[DropITLayer]] = {layer.plain: layer for layer in (DropITLinear, DropITConv2d)}

__all__ = ["SWAPS", "DropITLayer"]
