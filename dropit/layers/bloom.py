"""BLOOM's GELU, which saves its input in a Function of its own. Imported when a model has one."""

from __future__ import annotations

from transformers.models.bloom.modeling_bloom import BloomGelu

from dropit.layers.activation import DropITActivation
from dropit.layers.table import swap_class

DropITBloomGelu = swap_class(DropITActivation, BloomGelu, curve="bloom_gelu", __module__=__name__)
