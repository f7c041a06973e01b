"""DropIT: train with the top-k elements of each layer's input in memory, not all of them."""

from dropit.convert import COMPRESS, VALUE_DTYPES, Coverage, coverage, from_dropit, to_dropit
from dropit.layers import LosslessLayer, PackedInputLayer, QuantizedLayer, register
from dropit.memory import CacheMeter, estimate_cache
from dropit.strategies import STRATEGIES

__version__ = "0.1.0"
__all__ = [
    "COMPRESS",
    "STRATEGIES",
    "VALUE_DTYPES",
    "CacheMeter",
    "Coverage",
    "LosslessLayer",
    "PackedInputLayer",
    "QuantizedLayer",
    "coverage",
    "estimate_cache",
    "from_dropit",
    "register",
    "to_dropit",
]
