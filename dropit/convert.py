"""to_dropit and from_dropit: swap a model's layers for DropIT layers, and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dropit.coverage import PLAIN, WEIGHTED, coverage, obstacle, reportable_layers
from dropit.layers import DropITLayer, has_fixed_type, needs_bits, plain_type, set_own_type, swap_for
from dropit.policy import SavePolicy
from dropit.rematerialize import Memo
from dropit.saver import Saver
from dropit.strategies import STRATEGIES, ElementStrategy, RandomSource, Strategy, make_strategy

COMPRESS = ("none", "lossless", "int16", "int8", "int4", "int2")
_BITS = {"int16": 16, "int8": 8, "int4": 4, "int2": 2}
VALUE_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "int8": torch.int8}

_STATE = ("_dropit_saver", "_dropit_off")  # all that is ever added to a module

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
) -> nn.Module:
    """Convert the layers of ``model``, in place, so that they save less for the backward pass.

    Parameters, hooks and state_dict keys stay as they are. A converted model may be converted again, with other
    arguments. The recommended setting is ``gamma=0, compress="int8"``: all elements in 8 bits, none dropped.

    Args:
        model: The model.
        strategy: Which elements of the input of each layer with a weight are kept: a name in ``dropit.STRATEGIES``.
        gamma: The fraction of the elements that is dropped, in [0, 1) (the paper's gamma, section 3).
        block_size: Elements in one block of "fastmink"; None for 256, or for one block if there are 16,384 or fewer.
        per_sample: Choose within each sample ("fastmink", "mink", "random"), so that each keeps the same number.
        value_dtype: What kept elements are stored in where it is narrower than the input's dtype: torch.bfloat16 or
            torch.int8, with a scale for each 32 of them ("bf16" and "int8" will do). None stores them as they are.
        compress: How all else is saved: "none", as PyTorch does; "lossless", in fewer bytes with the same gradients bit
            for bit (masks of ReLU and dropout in bits, max-pooling in offsets), without which a dropped input stays in
            memory where one of these layers saves it as well; "int16", "int8", "int4" or "int2", beyond that, what
            normalization, smooth activations and attention save in so many bits and, where ``gamma`` is 0, all inputs.
            A layer that reads the output of one of these then saves nothing and drops nothing, whatever ``gamma`` is.
        stochastic: With int16, int8 and int4, round up or down at random, by how near, and not to the nearest.
        filter_fn: ``filter_fn(module, fqn)`` says which layers to convert; None for all that can be.
        seed: For "random", "random_c" and stochastic rounding: a seed of their own instead of PyTorch's.

    Returns:
        The model.

    Raises:
        TypeError: If ``model`` is not a module, or an argument is not of its type.
        ValueError: If an argument is out of range, or no layer with a weight could be converted; it says why.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> model = to_dropit(model, gamma=0, compress="int8")
        >>> model(torch.randn(16, 64)).sum().backward()
    """
    policy = make_policy(
        strategy,
        gamma,
        block_size=block_size,
        per_sample=per_sample,
        value_dtype=value_dtype,
        compress=compress,
        stochastic=stochastic,
        seed=seed,
    )
    targets = find_targets(model, filter_fn)
    _warn_if_nothing_shrinks(policy, model)
    memo = memo_of(model)
    for fqn, (module, swap) in targets.items():
        swap_in(module, swap if _is_wanted(swap, compress) else None, Saver(policy, memo, fqn))
    return model


def make_policy(
    strategy: str,
    gamma: float,
    *,
    block_size: int | None,
    per_sample: bool | None,
    value_dtype: torch.dtype | str | None,
    compress: str,
    stochastic: bool,
    seed: int | None,
) -> SavePolicy:
    """Return the policy that these arguments of :func:`to_dropit` ask for.

    Raises ValueError where they do not go together.
    """
    if compress not in COMPRESS:
        raise ValueError(f"compress must be one of {', '.join(COMPRESS)}, got {compress!r}")
    bits = _BITS.get(compress)
    if stochastic and bits not in (16, 8, 4):
        raise ValueError(f"stochastic rounding needs compress to be int16, int8 or int4, got {compress!r}")
    is_random = issubclass(STRATEGIES.get(strategy, Strategy), RandomSource)
    own_seed = None if stochastic and not is_random else seed
    chosen = make_strategy(strategy, gamma, block_size=block_size, per_sample=per_sample, seed=own_seed)
    dtype = _value_dtype(value_dtype)
    return SavePolicy(chosen, dtype, bits=bits, stochastic=stochastic, seed=seed if stochastic else None)


def find_targets(model: nn.Module, filter_fn: Filter | None) -> Targets:
    """Return the layers of ``model`` to convert, by name, and the class to swap into each.

    Raises TypeError if ``model`` is not a module, and ValueError if there is no layer with a weight among them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {model!r}")
    targets: Targets = {}
    for fqn, module in reportable_layers(model):
        swap = swap_for(plain_type(module))
        if swap is not None and not obstacle(module, swap) and (filter_fn is None or filter_fn(module, fqn)):
            targets[fqn] = (module, swap)
    if not any(swap.drops_input or swap.calls_functions for _, swap in targets.values()):
        raise ValueError(_nothing_converted(model))
    return targets


def memo_of(model: nn.Module) -> Memo:
    """Return the memo of a layer of ``model`` that was converted before, or a new one."""
    savers = (vars(module).get("_dropit_saver") for module in model.modules())
    return next((saver.memo for saver in savers if saver is not None), None) or Memo()


def swap_in(module: nn.Module, swap: type[DropITLayer] | None, saver: Saver) -> None:
    """Give ``module`` the class ``swap`` and the saver; make it plain where ``swap`` is None."""
    if swap is None:
        _restore(module)
        return
    set_own_type(module, swap)
    vars(module).pop("_dropit_off", None)
    vars(module)["_dropit_saver"] = saver


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return what a conversion has added to ``module``."""
    return {name: vars(module)[name] for name in _STATE if name in vars(module)}


def remove_state(module: nn.Module) -> None:
    """Remove what a conversion has added to ``module``."""
    for name in _STATE:
        vars(module).pop(name, None)


def _is_wanted(swap: type[DropITLayer], compress: str) -> bool:
    if swap.drops_input:
        return True
    return compress in _BITS if needs_bits(swap) else compress != "none"


def _value_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = VALUE_DTYPES.get(given, given) if isinstance(given, str) else given
    if dtype is not None and dtype not in VALUE_DTYPES.values():
        raise ValueError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {given!r}")
    return dtype  # type: ignore[return-value]


def _warn_if_nothing_shrinks(policy: SavePolicy, model: nn.Module) -> None:
    itemsize = min((parameter.dtype.itemsize for parameter in model.parameters()), default=4)
    break_even = 1 / (8 * itemsize)  # a bit of position for each element, against itemsize bytes
    gamma = policy.strategy.gamma
    if isinstance(policy.strategy, ElementStrategy) and policy.value_dtype is None and 0 < gamma <= break_even:
        warnings.warn(
            f"gamma {gamma} saves nothing: positions take more than is dropped; inputs stay dense "
            f"unless gamma is above {break_even:g}",
            stacklevel=3,
        )


def from_dropit(model: nn.Module) -> nn.Module:
    """Undo :func:`to_dropit` or :func:`dropit.fit_budget`, in place.

    Args:
        model: The model; one that was never converted stays as it is.

    Returns:
        The model, whose layers have their own classes again and no state of DropIT's.

    Example:
        >>> model = from_dropit(to_dropit(torch.nn.Sequential(torch.nn.Linear(8, 8))))
        >>> type(model[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    for module in model.modules():
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if isinstance(module, DropITLayer):
        remove_state(module)
        if has_fixed_type(module):
            vars(module)["_dropit_off"] = True
        else:
            set_own_type(module, plain_type(module))


def _nothing_converted(model: nn.Module) -> str:
    rows = [row for row in coverage(model) if isinstance(model.get_submodule(row.fqn), WEIGHTED)]
    if not rows:
        return f"converted no layer: {type(model).__name__} has no Linear or Conv layer"
    counts = Counter((row.type, row.reason.replace(PLAIN, "left out by filter_fn")) for row in rows)
    listed = "; ".join(f"{kind} x{count}: {reason}" for (kind, reason), count in counts.items())
    return f"converted 0 of {len(rows)}: {listed}"
