"""The layers that swap in, one family a file; importing a file enters its layers in the table."""

from dropit.layers import (
    activation,
    arithmetic,
    attention,
    avg_pool,
    bilinear,
    callers,
    conv,
    dropout,
    norm,
    pool,
    relu,
    transformer,
)
from dropit.layers.layer import DropITLayer, is_converted, is_lossless, needs_bits
from dropit.layers.linear import dropit_linear
from dropit.layers.table import (
    PARTS_OF_FORWARD,
    SWAPS,
    has_fixed_type,
    in_the_way,
    parent_in_table,
    plain_type,
    register,
    set_own_type,
    swap_for,
)

__all__ = [
    "PARTS_OF_FORWARD",
    "SWAPS",
    "DropITLayer",
    "activation",
    "arithmetic",
    "attention",
    "avg_pool",
    "bilinear",
    "callers",
    "conv",
    "dropit_linear",
    "dropout",
    "has_fixed_type",
    "in_the_way",
    "is_converted",
    "is_lossless",
    "needs_bits",
    "norm",
    "parent_in_table",
    "plain_type",
    "pool",
    "register",
    "relu",
    "set_own_type",
    "swap_for",
    "transformer",
]
