"""What is swapped for what: the table, how to add to it, and how a class that it lacks is given an entry."""

from __future__ import annotations

import copyreg
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from torch import nn

from dropit.layers.functions import without_calls_taken
from dropit.layers.layer import DropITLayer

SWAPS: dict[type[nn.Module], type[DropITLayer]] = {}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {}  # the same, the other way round
# Layers for any module whose class is such.
CALLERS: dict[Callable[[type[nn.Module]], bool], type[DropITLayer]] = {}
# Packages that are not imported unless the model brings them: the module here that has the layers of theirs.
_LAZY = {
    "transformers.pytorch_utils": "dropit.layers.huggingface",
    "transformers.activations": "dropit.layers.huggingface",
    "transformers.models.bloom.modeling_bloom": "dropit.layers.bloom",
    "timm.layers.activations": "dropit.layers.timm",
}
# What DropIT shows of a layer, where the layer's class has nothing of that name itself.
_SHOWN = ("saver", "strategy", "plain")
_READ = ("inplace",)  # what they define for layers that do not have it
# What else of a class decides what its forward computes.
PARTS_OF_FORWARD = ("forward", "_conv_forward", "_ff_block")

Layer = TypeVar("Layer", bound=type[DropITLayer])


def register(layer: Layer) -> Layer:
    """Have ``to_dropit`` swap modules of type ``layer.plain`` for ``layer``. A decorator.

    Args:
        layer: A subclass of :class:`dropit.DropITLayer` and of ``layer.plain`` that adds no state.

    Returns:
        ``layer``.

    Raises:
        TypeError: If it is no such class.
    """
    plain = getattr(layer, "plain", None)
    if not (isinstance(layer, type) and issubclass(layer, DropITLayer)):
        raise TypeError(f"{layer!r} is not a subclass of DropITLayer")
    if not (isinstance(plain, type) and issubclass(layer, plain)):
        raise TypeError(f"{layer.__name__}.plain must be the class that it takes the place of, got {plain!r}")
    _enter(plain, layer)
    return layer


def swap_class(layer: type[DropITLayer], plain: type[nn.Module], **members: Any) -> type[DropITLayer]:
    """Return the class to swap in for ``plain``, made of it and ``layer``, and have ``to_dropit`` do so.

    Its name is ``DropIT`` and the plain class's, under which pickle looks for it in the module of ``layer``; elsewhere
    ``__module__`` is to be given.
    """
    members = {"plain": plain, "__doc__": layer.__doc__, "__module__": layer.__module__, **members}
    return register(type(f"DropIT{plain.__name__}", (layer, plain), members))


def _enter(plain: type[nn.Module], layer: type[DropITLayer]) -> None:
    if not layer.calls_functions:
        layer.forward = without_calls_taken(layer.forward)  # type: ignore[method-assign]
    SWAPS[plain] = layer
    _PLAIN[layer] = plain


def register_where(fits: Callable[[type[nn.Module]], bool]) -> Callable[[Layer], Layer]:
    """Have ``to_dropit`` swap in the class for modules whose class fits, and is not in the table. A decorator."""

    def enter(layer: Layer) -> Layer:
        CALLERS[fits] = layer
        return layer

    return enter


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's own class, which is below any that PyTorch laid over it, or the one it had before it was swapped."""
    own = _own_type(type(module))
    return _PLAIN.get(own, own)


def set_own_type(module: nn.Module, own: type[nn.Module]) -> None:
    """Give the module another class, below those that are laid over its present one."""
    if own is not _own_type(type(module)):
        module.__class__ = _laid_over(type(module), _own_type(type(module)), own)  # type: ignore[assignment]


def has_fixed_type(module: nn.Module) -> bool:
    """Whether its class must stay, as methods are bound to it: ``super()`` of one laid over it, or a stored forward."""
    own = _own_type(type(module))
    above = [each for each in type(module).__mro__ if issubclass(each, own) and each is not own]
    codes = [getattr(value, "__code__", None) for each in above for value in vars(each).values()]
    if any("__class__" in getattr(code, "co_freevars", ()) for code in codes):
        return True
    swapped = [part for part in PARTS_OF_FORWARD if getattr(own, part, None) is not getattr(_PLAIN[own], part, None)]
    return not vars(module).keys().isdisjoint(swapped)


def _own_type(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that was swapped in; or ``kind``, without those that PyTorch makes at run time and lays over it."""
    swapped = next((each for each in kind.__mro__ if each in _PLAIN), None)
    if swapped is not None:
        return swapped  # type: ignore[no-any-return]
    while _is_made_by_torch(kind):
        kind = kind.__bases__[-1]
    return kind


def _is_made_by_torch(kind: type[nn.Module]) -> bool:
    """Whether it is a class such as ParametrizedLinear or FSDPLinear, which no module of PyTorch's has by that name."""
    home, name = kind.__module__, kind.__qualname__
    if home.partition(".")[0] != "torch" or "<locals>" in name or not issubclass(kind.__bases__[-1], nn.Module):
        return False
    found: Any = sys.modules.get(home)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not kind


def _laid_over(kind: type, below: type, instead: type) -> type:
    """``kind``, which is ``below`` or derives from it, with ``instead`` in its place.

    A new class with what ``kind`` defines: PyTorch writes properties into it, and takes its base for the module's own.
    """
    if kind is below:
        return instead
    bases = tuple(_laid_over(base, below, instead) if issubclass(base, below) else base for base in kind.__bases__)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    name = kind.__name__.removesuffix(below.__name__)
    return type(name + instead.__name__ if name != kind.__name__ else name, bases, members)


def swap_for(plain: type[nn.Module]) -> type[DropITLayer] | None:
    """The class to swap in for ``plain``: the table's, or one made of ``plain`` and a layer that does for it."""
    home = _LAZY.get(plain.__module__)
    if home is not None:
        with suppress(ImportError):  # a version of the package that has other layers
            importlib.import_module(home)
    if plain not in SWAPS:
        like = _entry_like(plain)
        if like is None:
            return None
        members = {"plain": plain, "__doc__": like.__doc__, "__reduce_ex__": _reduce}
        members |= {name: inspect.getattr_static(plain, name) for name in _SHOWN if hasattr(plain, name)}
        if like.calls_functions:  # by these names packages know their own modules
            members |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _enter(
            plain, type(plain.__name__ if like.calls_functions else f"DropIT{plain.__name__}", (like, plain), members)
        )
    return SWAPS[plain]


def _entry_like(plain: type[nn.Module]) -> type[DropITLayer] | None:
    """The parent's layer, or the one for the functions that the class calls."""
    parent = parent_in_table(plain)
    if parent is not None and _computes_the_same(plain, parent):
        return SWAPS[parent]
    return next((layer for fits, layer in CALLERS.items() if fits(plain)), None)


def in_the_way(module: nn.Module, swap: type[DropITLayer]) -> str | None:
    """A name that the module or its own class gives to something else than ``swap`` does."""
    ours, base = _names_added(swap)  # type: ignore[arg-type]
    theirs = {*vars(module), *module._parameters, *module._buffers, *module._modules, *dir(_PLAIN[swap])}
    return min(ours & theirs - base, default=None)


@cache
def _names_added(swap: type[DropITLayer]) -> tuple[frozenset[str], frozenset[str]]:
    """What DropIT's classes define, but for what they show, and what the class has for which they are made."""
    classes = [each for each in swap.__mro__ if issubclass(each, DropITLayer)]
    made_here = vars(swap).get("__reduce_ex__") is _reduce
    names = {name for each in classes for name in vars(each) if not name.startswith(("__", "_dropit"))}
    return frozenset(names.difference(_SHOWN, _READ)), frozenset(dir(classes[made_here].plain))


def parent_in_table(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The nearest class above ``plain`` that the table has."""
    return next((parent for parent in plain.__mro__ if parent in SWAPS), None)


def _computes_the_same(plain: type[nn.Module], parent: type[nn.Module]) -> bool:
    # A lazy module has no shape yet, and becomes its parent when it has.
    lazy = issubclass(plain, nn.modules.lazy.LazyModuleMixin)
    return not lazy and all(getattr(plain, part, None) is getattr(parent, part, None) for part in PARTS_OF_FORWARD)


def _reduce(self: DropITLayer, protocol: Any) -> tuple[Any, ...]:
    """How pickle and copy take a module whose class was made here: as the plain class does, and then swapped."""
    own = _own_type(type(self))
    made: Any = super(own, self).__reduce_ex__(max(protocol, 2))  # type: ignore[misc]
    if type(self) is not own:  # whoever laid a class over it says whether it can be pickled
        return made  # type: ignore[no-any-return]
    make, arguments, *rest = made
    plain = _PLAIN[own]
    return _rebuild, (plain, make, *(plain if each is own else each for each in arguments)), *rest


def _rebuild(plain: type[nn.Module], make: Callable[..., nn.Module] = copyreg.__newobj__, *arguments: Any) -> nn.Module:  # type: ignore[attr-defined]
    module = make(*arguments)
    swap = swap_for(plain)
    assert swap is not None
    module.__class__ = swap  # type: ignore[assignment]
    return module
