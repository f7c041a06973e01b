"""fit_budget: spend a budget of bytes where it lowers the gradients' error most.

What each way to treat a layer costs is measured (:mod:`dropit.calibration`); the choice of one for each layer with the
least error in sum is then found exactly, and adjusted until what the model really saves fits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dropit.calibration import Calibration, Choice, Configure, Item, Option, Setting, in_training
from dropit.convert import Filter, Targets, find_targets, make_policy, memo_of, remove_state, state_of, swap_in
from dropit.layers import needs_bits
from dropit.policy import SavePolicy
from dropit.saver import Saver

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Where in the range of gamma a step is taken: closer where much is dropped, as there an element more counts most.
_PARTS = (1.0, 0.95, 0.875, 0.75, 0.5, 0.0)
_CELLS = 20_000  # that the bytes to spend are cut into
_CLOSE = 0.985  # a part of the budget that is near enough
_ENOUGH = 0.97  # and one below which errors that do not matter are traded for the rest
_NEGLIGIBLE = 1e-9  # such an error: gradients are off by 3e-5
_TRIES = 10
_LEVELS = (8, 16, 4, 2)  # bits that may be chosen; as Calibration takes them


def fit_budget(
    model: nn.Module,
    budget: int | str,
    example_input: Any,
    *,
    strategy: str = "fastmink",
    block_size: int | None = None,
    per_sample: bool | None = None,
    value_dtype: torch.dtype | str | None = None,
    stochastic: bool = False,
    filter_fn: Filter | None = None,
    seed: int | None = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    gamma_min: float = 0.0,
    gamma_max: float = 0.98,
    on_step: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Convert the layers of ``model``, in place, so that a forward pass saves at most ``budget`` bytes.

    For each layer gamma, the dtype of kept values and the number of bits are chosen so that the gradients err least,
    together and each layer's relative to itself. To measure that, 21 steps on ``example_input`` are taken, and one for
    each group of layers that quantizes, in training mode; once one does not fit into the GPU's memory, what the steps
    save waits in the host's. The model's state stays as it was, and hooks on parameters are not called.

    Args:
        model: The model.
        budget: Bytes, or text such as "4 GiB".
        example_input: A batch of the size that the budget is for: a tensor, a tuple of arguments, or a dict of named
            ones.
        strategy, block_size, per_sample, stochastic, filter_fn, seed: As in :func:`dropit.to_dropit`; 2 bits are
            rounded to the nearest in any case.
        value_dtype: What kept values are stored in, where a layer does not keep them as they are; None for int8.
        loss_fn: The loss, of the model's output; what it saves counts, too. None for a Hugging Face output's own, or
            the mean of the squares, which does not count.
        gamma_min, gamma_max: The range of gamma, 0 <= gamma_min <= gamma_max < 1.
        on_step: Called after each step with its number and how many there are, to show progress.

    Returns:
        The model.

    Raises:
        ValueError: If an argument is out of range, no layer could be converted, or the least that the model can save is
            more than the budget; the model is then as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> model = fit_budget(model, "20 KB", torch.randn(64, 64))
    """
    nbytes = parse_bytes(budget)
    if not 0 <= gamma_min <= gamma_max < 1:
        raise ValueError(f"0 <= gamma_min <= gamma_max < 1 is needed, got {gamma_min} and {gamma_max}")
    policy = make_policy(
        strategy,
        gamma_max,
        block_size=block_size,
        per_sample=per_sample,
        value_dtype=value_dtype,
        compress="int8",
        stochastic=stochastic,
        seed=seed,
    )
    targets = find_targets(model, filter_fn)
    before = [(module, type(module), state_of(module)) for module, _ in targets.values()]
    # With random numbers of their own, layers leave dropout's alone: steps differ in nothing but the setting.
    measured = _with_seed(policy, 0) if policy.is_random and seed is None else policy

    def forward() -> Any:
        output = _call(model, example_input)
        return output if loss_fn is None else loss_fn(output)

    try:
        _configure(model, targets, measured, dict.fromkeys(targets, Choice(gamma_max, policy.value_dtype, 8)))
        setting = fit(
            model,
            nbytes,
            lambda setting: _configure(model, targets, measured, setting),
            forward,
            _some_loss if loss_fn is None else _itself,
            gamma_min=gamma_min,
            gamma_max=gamma_max,
            value_dtype=policy.value_dtype or torch.int8,
            levels=_LEVELS,
            on_step=on_step,
        )
    except BaseException:
        for module, kind, state in before:
            remove_state(module)
            module.__class__ = kind  # type: ignore[assignment]
            vars(module).update(state)
        raise
    _configure(model, targets, policy, setting)
    return model


def _with_seed(policy: SavePolicy, seed: int) -> SavePolicy:
    if policy.stochastic:
        policy = dataclasses.replace(policy, seed=seed)
    if hasattr(policy.strategy, "seed"):
        policy = dataclasses.replace(policy, strategy=dataclasses.replace(policy.strategy, seed=seed))  # type: ignore[call-arg]
    return policy


def _configure(model: nn.Module, targets: Targets, policy: SavePolicy, setting: Setting) -> None:
    """Convert each layer to the policy of its choice."""
    memo = memo_of(model)
    for fqn, (module, swap) in targets.items():
        choice = setting.get(fqn, Choice())
        wanted = not needs_bits(swap) or choice.bits is not None
        swap_in(module, swap if wanted else None, Saver(policy.replaced(**choice._asdict()), memo, fqn))


def _call(model: nn.Module, example: Any) -> Any:
    example = _copied(dict(example) if isinstance(example, Mapping) else example)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _copied(example: Any) -> Any:
    """Return tensors that a model may change in place, and leaves of no graph; what is one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        if id(x) not in copies:
            dense = x.layout is torch.strided and 0 not in x.stride()  # or it cannot be changed in place
            copies[id(x)] = (x.detach().clone() if dense else x.detach()).requires_grad_(x.requires_grad)
        return copies[id(x)]

    return tree_map_only(Tensor, copied, example)


def _itself(loss: Tensor) -> Tensor:
    return loss


def _some_loss(output: Any) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss  # type: ignore[no-any-return]
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().square().mean() for leaf in tensors]).sum()


def parse_bytes(given: int | str) -> int:
    """``"4 GiB"``, ``"500 MB"`` or a number of bytes. Raises ValueError for anything else, and for nothing."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", str(given).lower())
    try:
        nbytes = int(float(match[1]) * UNITS[match[2]])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"budget must be a number of bytes or text such as '4 GiB', got {given!r}")
    return nbytes


class Plan:
    """The options of all items with the least error in sum, for any number of bytes: a knapsack, by cells of bytes.

    ``unspent``: the error that all bytes count as where they are left over.
    """

    def __init__(self, items: list[Item], unspent: float = 0.0) -> None:
        self._items = [Item(item.names, _worthwhile(item.options)) for item in items]
        self.span = sum(item.options[-1].nbytes - item.options[0].nbytes for item in self._items)
        self._price = unspent / max(self.span, 1.0)
        self._cell = max(self.span / _CELLS, 1e-9)
        self._picks: list[Tensor] = []  # of each item, for each number of cells: which option
        # By cells, of which each item may waste a part of one.
        least = torch.zeros(_CELLS + len(items) + 1, dtype=torch.float64)
        for item in self._items:
            least, pick = self._with(item, least)
            self._picks.append(pick)

    def _with(self, item: Item, least: Tensor) -> tuple[Tensor, Tensor]:
        errors = torch.full_like(least, float("inf"))
        pick = torch.zeros(len(least), dtype=torch.int16)
        for index, option in enumerate(item.options):
            cells = self._cells(item, index)
            error = least[: len(least) - cells] + option.error - self._price * option.nbytes
            better = error < errors[cells:]
            errors[cells:][better] = error[better]
            pick[cells:][better] = index
        return errors, pick

    def _cells(self, item: Item, index: int) -> int:
        exact = (item.options[index].nbytes - item.options[0].nbytes) / self._cell
        return math.ceil(round(exact, 6))

    def setting(self, spare: float) -> Setting:
        """Return what to choose where ``spare`` bytes may be saved beyond the least that the items can."""
        chosen: Setting = {}
        cells = _CELLS + len(self._items)
        left = cells if spare >= self.span else max(int(spare / self._cell), 0)
        for item, pick in zip(reversed(self._items), reversed(self._picks), strict=True):
            index = int(pick[left])
            chosen.update(dict.fromkeys(item.names, item.options[index].choice))
            left -= self._cells(item, index)
        return chosen


def _worthwhile(options: list[Option]) -> list[Option]:
    """Those that no other beats, by bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def fit(
    model: nn.Module,
    budget: int,
    configure: Configure,
    forward: Callable[[], Any],
    loss_fn: Callable[[Any], Tensor],
    *,
    gamma_min: float,
    gamma_max: float,
    value_dtype: torch.dtype,
    levels: tuple[int, ...],
    on_step: Callable[[int, int], None] | None = None,
) -> Setting:
    """Return the setting of least error under which ``forward()`` saves at most ``budget`` bytes.

    ``configure`` applies a setting. ``loss_fn``: of what ``forward`` returns; what it saves does not count.
    ``value_dtype``: what kept values are stored in, but where all are kept as they are. ``levels``: the numbers of bits
    that may be chosen. ``on_step``: called with the number of steps taken and of all. Raises ValueError where not even
    the least setting fits. A model in eval mode is measured in training mode.
    """
    gammas = sorted({gamma_min + (gamma_max - gamma_min) * part for part in _PARTS}, reverse=True)
    calibration = Calibration(
        model, configure, forward, loss_fn, gammas=gammas, value_dtype=value_dtype, levels=levels, on_step=on_step
    )
    with in_training(model):
        items = calibration.items()
        plan = Plan(items)
        least = calibration.saved_bytes(plan.setting(0))
        if least > budget:
            raise ValueError(
                f"budget of {budget / 2**20:.1f} MiB cannot be met: the least that this model saves is "
                f"{least / 2**20:.1f} MiB"
            )
        saved, chosen = _spend(plan, budget, least, calibration.saved_bytes)
        if saved < _ENOUGH * budget and budget - least < plan.span:
            fuller, other = _spend(Plan(items, _NEGLIGIBLE), budget, least, calibration.saved_bytes)
            chosen = other if fuller > saved else chosen
        return chosen


def _spend(plan: Plan, budget: int, least: int, measure: Callable[[Setting], int]) -> tuple[int, Setting]:
    """Return the bytes that the plan's setting for ``budget`` saves, and the setting.

    That is almost, but not quite, the sum of its items: what is spent beyond ``least`` is moved until it fits.
    """
    low, high, spare = 0.0, plan.span + 1, float(budget - least)
    best, chosen = least, plan.setting(0)
    for _ in range(_TRIES):
        setting = plan.setting(spare)
        saved = measure(setting)
        if saved <= budget:
            low = spare
            if saved >= best:
                best, chosen = saved, setting
            if saved >= _CLOSE * budget or spare >= plan.span:
                break
        else:
            high = spare
        moved = spare + (1 + _CLOSE) / 2 * budget - saved
        spare = moved if low < moved < high else (low + high) / 2
    return best, chosen
