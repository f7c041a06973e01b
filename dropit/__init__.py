"""DropIT: train with the top-k elements of each layer's input in memory, not all of them."""

from typing import TYPE_CHECKING, Any

from dropit.budget import fit_budget
from dropit.convert import COMPRESS, VALUE_DTYPES, from_dropit, to_dropit
from dropit.coverage import Coverage, coverage
from dropit.layers import DropITLayer, register
from dropit.memory import CacheMeter, estimate_cache
from dropit.strategies import STRATEGIES

if TYPE_CHECKING:
    from dropit.lightning import CacheMonitor as CacheMonitor
    from dropit.lightning import DropITCallback as DropITCallback

__version__ = "0.1.0"
__all__ = [
    "COMPRESS",
    "STRATEGIES",
    "VALUE_DTYPES",
    "CacheMeter",
    "Coverage",
    "DropITLayer",
    "coverage",
    "estimate_cache",
    "fit_budget",
    "from_dropit",
    "register",
    "to_dropit",
]

# They need Lightning, which is imported when one is asked for; not in __all__, or "import *" would ask.
_CALLBACKS = ("CacheMonitor", "DropITCallback")


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dropit import lightning

    return getattr(lightning, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLBACKS})
