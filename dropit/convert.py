"""Swap a model's layers for DropIT layers and back, and say which were."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dropit.budget import fit, parse_bytes
from dropit.calibration import Choice, Setting
from dropit.layers import (
    PARTS_OF_FORWARD,
    SWAPS,
    DropITLayer,
    LosslessLayer,
    PackedInputLayer,
    QuantizedLayer,
    has_fixed_type,
    in_the_way,
    is_converted,
    parent_in_table,
    plain_type,
    set_own_type,
    swap_for,
)
from dropit.memory import CacheMeter
from dropit.packer import Packer
from dropit.strategies import STRATEGIES, ElementStrategy, RandomSource, Strategy, make_strategy

# Layers that keep their input for a weight gradient: the report speaks of them even if their type is not in the table.
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.modules.conv._ConvNd, nn.MultiheadAttention)
COMPRESS = ("none", "lossless", "int16", "int8", "int4")
_BITS = {"int16": 16, "int8": 8, "int4": 4}
_LEVELS = (8, 16, 4)  # bits that a budget may choose; as Calibration takes them
VALUE_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_PLAIN = "plain: left out, or to_dropit was not called"
_REPLACED = "not converted: its forward was replaced on the module itself"
_NOT_QUANTIZED = 'plain: compress="int8" or "int4" would store it in fewer bits'

_STATE = ("_dropit_packer", "_dropit_off")  # all that is ever added to a module

Filter = Callable[[nn.Module, str], bool]
Targets = dict[str, tuple[nn.Module, type[DropITLayer]]]  # by name: a module, and the class to swap in


def to_dropit(
    model: nn.Module,
    strategy: str = "fastmink",
    gamma: float = 0.9,
    *,
    block_size: int | None = None,
    per_sample: bool | None = None,
    value_dtype: torch.dtype | str | None = None,
    compress: str = "lossless",
    stochastic: bool = False,
    filter_fn: Filter | None = None,
    seed: int | None = None,
    budget: int | str | None = None,
    example_input: Any = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    gamma_min: float = 0.0,
    gamma_max: float = 0.98,
    on_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Make the layers of ``model`` keep only part of their input for the backward pass. In place; returns the model.

    strategy: a name in ``dropit.STRATEGIES``. gamma: the fraction of the elements that is dropped, in [0, 1).
    block_size: elements in one block of "fastmink"; None for 256, or for one block if there are 16,384 or fewer.
    per_sample: choose within each sample ("fastmink", "mink", "random"), so that a large one cannot empty the others.
    value_dtype: what the kept elements are stored in where it is narrower than the input's dtype: torch.bfloat16, or
    torch.int8 with a scale for each 32 of them ("bf16" and "int8" will do). None stores them as they are.
    compress: how the other layers keep what they keep: "none", as PyTorch does; "lossless", with the same gradients
    bit for bit (ReLU and dropout as bits, max-pooling as offsets), so that dropped inputs are really let go; "int16",
    "int8" or "int4", beyond that in so many bits what normalization, smooth activations and attention keep (as it is
    where it takes no more); a layer that reads the output of one of these then stores nothing and drops nothing,
    whatever ``gamma`` is.
    stochastic: with these three, round up or down at random, by how near, and not to the nearest.
    filter_fn(module, fqn): which layers to convert.
    seed: for "random", "random_c" and stochastic rounding, their own random numbers instead of PyTorch's.

    budget: bytes, or text such as "4 GiB", that a forward pass of ``example_input`` may hold for backward. Each layer's
    gamma, in [gamma_min, gamma_max], whether it stores its values in int8 (or in ``value_dtype``, if given), and its
    bits are then chosen so that it fits and the gradients err least, together and each layer's relative to itself;
    ``gamma`` and ``compress`` are not asked. 16 steps and one for each group of layers that quantizes are taken to
    measure that, with ``loss_fn`` of the output (if None the mean of its squares, or a Hugging Face output's own loss);
    once one does not fit into the GPU's memory, what they save waits in the host's. They run in training mode; the
    model's state stays as it was, and hooks on parameters are not called.
    example_input: a batch: a tensor, a tuple of arguments, or a dict of named ones.
    on_step: called after each of these steps with its number and how many there are, to show progress.

    Parameters, hooks and state_dict keys stay as they are. A converted model may be converted again, under other
    arguments. Raises ValueError where an argument is out of range or no layer with a weight could be converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {model!r}")
    if budget is not None:
        if example_input is None:
            raise ValueError("budget needs example_input, a batch of the size that it is for")
        if not 0 <= gamma_min <= gamma_max < 1:
            raise ValueError(f"0 <= gamma_min <= gamma_max < 1 is needed, got {gamma_min} and {gamma_max}")
        parse_bytes(budget)
        gamma, compress = gamma_max, "int8"  # to begin with
    make = partial(
        _packer,
        strategy,
        gamma,
        block_size=block_size,
        per_sample=per_sample,
        value_dtype=_value_dtype(value_dtype),
        compress=compress,
        stochastic=stochastic,
    )
    packer = make(seed=seed)
    targets: Targets = {}
    for fqn, module in _reportable_layers(model):
        swap = swap_for(plain_type(module))
        if swap is not None and not _obstacle(module, swap) and (filter_fn is None or filter_fn(module, fqn)):
            targets[fqn] = (module, swap)
    if not any(issubclass(swap, PackedInputLayer) for _, swap in targets.values()):
        raise ValueError(_nothing_converted(model))
    _warn_if_nothing_shrinks(packer, model)
    before = [(module, type(module), _state_of(module)) for module, _ in targets.values()]
    for fqn, (module, swap) in targets.items():
        _swap(module, swap if _is_wanted(swap, compress) else None, packer.for_layer(fqn))
    if budget is None:
        return model

    # With random numbers of their own, layers leave dropout its: steps differ in nothing but the setting.
    calibrated = make(seed=0) if packer.draws and seed is None else packer
    try:
        setting = fit(
            model,
            parse_bytes(budget),
            lambda setting: _configure(targets, calibrated, setting),
            lambda: _call(model, example_input),
            loss_fn or _some_loss,
            gamma_min=gamma_min,
            gamma_max=gamma_max,
            value_dtype=packer.value_dtype or torch.int8,
            levels=_LEVELS,
            on_step=on_step,
        )
    except BaseException:
        for module, kind, state in before:
            _forget(module)
            module.__class__ = kind  # type: ignore[assignment]
            vars(module).update(state)
        raise
    _configure(targets, packer, setting)
    return model


def _packer(
    strategy: str,
    gamma: float,
    *,
    block_size: int | None,
    per_sample: bool | None,
    value_dtype: torch.dtype | None,
    compress: str,
    stochastic: bool,
    seed: int | None,
) -> Packer:
    """Raises ValueError where the arguments do not go together."""
    if compress not in COMPRESS:
        raise ValueError(f"compress must be one of {', '.join(COMPRESS)}, got {compress!r}")
    bits = _BITS.get(compress)
    if stochastic and bits is None:
        raise ValueError(f"stochastic rounding needs compress to be int16, int8 or int4, got {compress!r}")
    draws = issubclass(STRATEGIES.get(strategy, Strategy), RandomSource)
    own_seed = None if stochastic and not draws else seed
    chosen = make_strategy(strategy, gamma, block_size=block_size, per_sample=per_sample, seed=own_seed)
    return Packer(chosen, value_dtype, bits=bits, stochastic=stochastic, seed=seed if stochastic else None)


def _swap(module: nn.Module, swap: type[DropITLayer] | None, packer: Packer) -> None:
    if swap is None:
        _restore(module)
        return
    set_own_type(module, swap)
    vars(module).pop("_dropit_off", None)
    if issubclass(swap, (PackedInputLayer, QuantizedLayer)):
        vars(module)["_dropit_packer"] = packer


def _state_of(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in _STATE if name in vars(module)}


def _forget(module: nn.Module) -> None:
    for name in _STATE:
        vars(module).pop(name, None)


def _configure(targets: Targets, like: Packer, setting: Setting) -> None:
    """Give each layer the packer of its own choice; those of one choice share theirs."""
    packers: dict[Choice, Packer] = {}
    for fqn, (module, swap) in targets.items():
        choice = setting.get(fqn, Choice())
        if choice not in packers:
            packers[choice] = like.replaced(**choice._asdict())
        wanted = choice.bits is not None or not issubclass(swap, QuantizedLayer)
        _swap(module, swap if wanted else None, packers[choice].for_layer(fqn))


def _call(model: nn.Module, example: Any) -> Any:
    example = _copied(dict(example) if isinstance(example, Mapping) else example)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _copied(example: Any) -> Any:
    """Tensors that a model may change in place, and leaves of no graph; what is one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        if id(x) not in copies:
            dense = x.layout is torch.strided and 0 not in x.stride()  # or it cannot be changed in place
            copies[id(x)] = (x.detach().clone() if dense else x.detach()).requires_grad_(x.requires_grad)
        return copies[id(x)]

    return tree_map_only(Tensor, copied, example)


def _some_loss(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss  # type: ignore[no-any-return]
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().square().mean() for leaf in tensors]).sum()


def _is_wanted(swap: type[DropITLayer], compress: str) -> bool:
    if issubclass(swap, LosslessLayer):
        return compress != "none"
    return compress in _BITS or not issubclass(swap, QuantizedLayer)


def _value_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = VALUE_DTYPES.get(given, given) if isinstance(given, str) else given
    if dtype is not None and dtype not in VALUE_DTYPES.values():
        raise ValueError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {given!r}")
    return dtype  # type: ignore[return-value]


def _warn_if_nothing_shrinks(packer: Packer, model: nn.Module) -> None:
    itemsize = min((parameter.dtype.itemsize for parameter in model.parameters()), default=4)
    break_even = 1 / (8 * itemsize)  # a bit of position for each element, against itemsize bytes
    gamma = packer.strategy.gamma
    if isinstance(packer.strategy, ElementStrategy) and packer.value_dtype is None and 0 < gamma <= break_even:
        warnings.warn(
            f"gamma {gamma} saves nothing: positions take more than is dropped; inputs stay dense "
            f"unless gamma is above {break_even:g}",
            stacklevel=3,
        )


def from_dropit(model: nn.Module) -> nn.Module:
    """Undo :func:`to_dropit`, in place. Returns the model."""
    for module in model.modules():
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if isinstance(module, DropITLayer):
        _forget(module)
        if has_fixed_type(module):
            vars(module)["_dropit_off"] = True
        else:
            set_own_type(module, plain_type(module))


@dataclass(frozen=True)
class LayerCoverage:
    """One layer of the report. ``reason`` is empty where the layer is converted.

    ``note`` says what keeps a converted layer from helping, where a CacheMeter has seen it.
    """

    fqn: str
    type: str
    reason: str
    note: str = ""

    @property
    def status(self) -> str:
        """ "converted", and what keeps it from helping; or why it is not."""
        return self.reason or ", but ".join(filter(None, ["converted", self.note]))


class Coverage(list[LayerCoverage]):
    """The layers of a model that DropIT could make keep less, and whether it does."""

    @property
    def converted(self) -> int:
        """How many are converted."""
        return sum(not row.reason for row in self)

    def __str__(self) -> str:
        rows = [("layer", "type", "status"), *((row.fqn or "(root)", row.type, row.status) for row in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{fqn:{widths[0]}}  {kind:{widths[1]}}  {status}" for fqn, kind, status in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: "converted 9 of 17", and how many of these do not help."""
        hindered = sum(bool(row.note) for row in self)
        but = f", of which {hindered} free nothing (their notes say why)" if hindered else ""
        return f"converted {self.converted} of {len(self)}{but}"


def coverage(model: nn.Module, meter: CacheMeter | None = None) -> Coverage:
    """Say of each layer that DropIT could make keep less whether it is converted, or why not.

    With a ``meter`` that measured a step of this model, say also which converted layers cannot help: those whose input
    another operation holds as well (a functional ``F.relu`` cannot be swapped), and those that were not called.
    """
    return Coverage(
        LayerCoverage(fqn, plain_type(module).__name__, _reason(module), _note(module, fqn, meter))
        for fqn, module in _reportable_layers(model)
    )


def _note(module: nn.Module, fqn: str, meter: CacheMeter | None) -> str:
    if meter is None or isinstance(module, LosslessLayer) or not is_converted(module):
        return ""
    if fqn not in meter.ran():
        return "not called: another module may read its weight by itself"
    elsewhere = meter.held_elsewhere(fqn)
    holders = " and ".join(f"{holder} ({nbytes / 2**20:.2f} MiB)" for holder, nbytes in elsewhere.items())
    return f"its input stays held by {holders}" if holders else ""


def _reportable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {id(child) for attention in attentions for child in attention.children()}  # which attention never calls
    for fqn, module in model.named_modules():
        known = swap_for(plain_type(module)) is not None or isinstance(module, (*_WEIGHTED, *SWAPS))
        if known and id(module) not in inside:
            yield fqn, module


def _reason(module: nn.Module) -> str:
    if is_converted(module):
        return "" if _reaches_ours(module) else _REPLACED
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "not converted: it has no shape yet; run a forward pass first"
    plain = plain_type(module)
    swap = swap_for(plain)
    if swap is not None:
        return _obstacle(module, swap) or (_NOT_QUANTIZED if issubclass(swap, QuantizedLayer) else _PLAIN)
    parent = parent_in_table(plain)
    if parent is not None:
        return f"not converted: its forward is not {parent.__name__}'s"
    return "not converted: this type is not supported"


def _obstacle(module: nn.Module, swap: type[DropITLayer]) -> str:
    """What keeps the module from being converted, if anything does."""
    if isinstance(module, DropITLayer):
        return ""
    if not vars(module).keys().isdisjoint(PARTS_OF_FORWARD):  # as accelerate's hooks set it: a class would not matter
        return _REPLACED
    name = in_the_way(module, swap)
    return f"not converted: its own {name!r} is a name that DropIT's layer needs" if name else ""


def _reaches_ours(module: nn.Module) -> bool:
    """Whether the forward that was set on a converted module, if one was, holds that of its class, and may call it."""
    if vars(module).keys().isdisjoint(PARTS_OF_FORWARD):
        return True
    return any(_holds(value, module) for value in vars(module).values() if callable(value))


def _holds(found: Any, module: nn.Module, depth: int = 5) -> bool:
    """Whether ``found`` is the forward of the module's class, or has it: wrapped, in a closure, or as an attribute."""
    ours = type(module).forward
    if found is ours or (isinstance(found, MethodType) and found.__func__ is ours):
        return getattr(found, "__self__", module) is module
    if depth == 0 or isinstance(found, (nn.Module, Tensor, type)):
        return False
    return any(_holds(part, module, depth - 1) for part in _parts(found) if callable(part) or isinstance(part, tuple))


def _parts(found: Any) -> Iterator[Any]:
    if isinstance(found, (tuple, list)):
        yield from found
    elif isinstance(found, partial):
        yield from (found.func, *found.args, *found.keywords.values())
    elif isinstance(found, MethodType):
        yield found.__func__
        yield from getattr(found.__self__, "__dict__", {}).values()
    yield from getattr(found, "__dict__", {}).values()
    yield from getattr(found, "__defaults__", None) or ()
    for cell in getattr(found, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty as yet
            yield cell.cell_contents


def _nothing_converted(model: nn.Module) -> str:
    rows = [row for row in coverage(model) if isinstance(model.get_submodule(row.fqn), _WEIGHTED)]
    if not rows:
        return f"converted no layer: {type(model).__name__} has no Linear or Conv layer"
    counts = Counter((row.type, row.reason.replace(_PLAIN, "left out by filter_fn")) for row in rows)
    listed = "; ".join(f"{kind} x{count}: {reason}" for (kind, reason), count in counts.items())
    return f"converted 0 of {len(rows)}: {listed}"
