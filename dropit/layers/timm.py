"""timm's activations with arguments of their own. Imported when a model has one."""

from __future__ import annotations

from timm.layers.activations import GELU, GELUTanh

from dropit.layers.activation import DropITActivation
from dropit.layers.table import swap_class

DropITGELU = swap_class(DropITActivation, GELU, curve="gelu", __module__=__name__)
DropITGELUTanh = swap_class(DropITActivation, GELUTanh, curve="gelu_tanh", __module__=__name__)
