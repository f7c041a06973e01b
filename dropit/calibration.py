"""Measure what each setting of a layer costs: the bytes that it saves, and the error of the gradients.

Dropping leaves the gradients of activations exact, so what it costs one layer's weight gradient is independent of all
other layers: a few steps on one batch, each with another gamma for all layers, give every layer's error. Quantization's
error reaches the gradients of all layers before, and how much of it does cannot be told from one layer (in a ViT the
first attention makes a third of it, the second hardly any), so that there each layer is measured in a step of its own.
Rounding errors of different layers are independent: their squares add up, in ViT-B/16 to within 3 % of the error with
all layers quantized.

An error is the square of what a gradient is off by, relative to the square of all gradients together plus, as a mean
over the layers, relative to that of its own layer. The first is what SGD steps by. The second is what Adam does, and
without it a layer whose gradients are small as yet would be given up: a ConvNeXt's blocks, scaled by 1e-6 at first.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from dropit.layers import is_converted
from dropit.memory import CacheMeter

_BETWEEN = 8  # values of gamma from one step's to the next's


class Choice(NamedTuple):
    """How a layer saves its tensors: ``gamma`` and ``value_dtype`` of its packed input, ``bits`` of all else."""

    gamma: float = 0.0
    value_dtype: torch.dtype | None = None
    bits: int | None = None


Setting = dict[str, Choice]  # of each layer by name
Configure = Callable[[Setting], None]
Rounding = dict[tuple[str, ...], dict[int, float]]  # by names of layers and bits: error
Gradients = dict[str, list[Tensor]]  # of each layer's own parameters, by its name


class Option(NamedTuple):
    """One setting of an item, its bytes, and its error."""

    choice: Choice
    nbytes: float
    error: float


class Item(NamedTuple):
    """Layers that get the same setting, as they save something together, and their options."""

    names: tuple[str, ...]
    options: list[Option]


class Calibration:
    """Passes on one batch, each of which leaves the model's state as it found it.

    ``configure`` applies a setting; ``loss_fn`` is of what ``forward`` returns. ``gammas``: where a step is taken,
    downwards. ``levels``: the numbers of bits there are; under the first dropping is measured as well, the last are the
    fewest.
    """

    def __init__(
        self,
        model: nn.Module,
        configure: Configure,
        forward: Callable[[], Any],
        loss_fn: Callable[[Any], Tensor],
        *,
        gammas: Sequence[float],
        value_dtype: torch.dtype,
        levels: Sequence[int],
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model, self._configure, self._forward, self._loss_fn = model, configure, forward, loss_fn
        self._gammas, self._value_dtype, self._levels, self._on_step = gammas, value_dtype, levels, on_step
        named: dict[str, Any] = {fqn: module for fqn, module in model.named_modules() if is_converted(module)}
        self._packing = [fqn for fqn, module in named.items() if module.drops_input]
        self._quantizing = [fqn for fqn, module in named.items() if module.quantizes]
        self._weights: dict[str, float] = {}  # of each layer's error
        self._offloads = False  # what a step saves waits in the host's memory
        self._steps = self._taken = 0

    def saved_bytes(self, setting: Setting) -> int:
        """Return the bytes that a forward pass saves; they are freed at once."""
        return self._meter(setting).total_bytes

    def items(self) -> list[Item]:
        """Return what there is to choose, with the bytes and the error of each option."""
        undropped, packed = self._undropped(), self._packed()
        in_other_bits = [packed[0]._replace(bits=bits) for bits in self._levels[1:]]
        meters = {choice: self._meter(self._all(choice)) for choice in (*undropped, *packed, *in_other_bits)}
        groups = self._groups(meters)
        quantizing = [names for names in groups if any(fqn in self._quantizing for fqn in names)]
        inputs = [names for names in groups if names not in quantizing]
        self._steps = len(undropped) + len(packed) + len(quantizing) + len(self._levels)
        with _nothing_at_zero(self._model):
            exact = self._gradients(self._all(undropped[0]))
            self._weights = _weights(exact)
            rounded = self._gradients(self._all(undropped[1]))
            overall = sum(self._errors(rounded, exact).values())
            dropping = {
                choice: self._errors(self._gradients(self._all(choice)), rounded if choice.bits else exact)
                for choice in packed
            }
            del rounded
            rounding = self._rounding(quantizing, exact, overall) | self._input_rounding(inputs, exact)
        saved = {choice: defaultdict(int, meter.by_module()) for choice, meter in meters.items()}
        return [Item(names, self._options(names, saved, dropping, rounding)) for names in groups]

    def _undropped(self) -> list[Choice]:
        """Without dropping: exact, then by bits."""
        return [Choice(), *(Choice(bits=bits) for bits in self._levels)]

    def _packed(self) -> list[Choice]:
        return [Choice(gamma, self._value_dtype, bits) for gamma in self._gammas for bits in (None, self._levels[0])]

    def _all(self, choice: Choice) -> Setting:
        return dict.fromkeys({*self._packing, *self._quantizing}, choice)

    def _groups(self, meters: dict[Choice, CacheMeter]) -> list[tuple[str, ...]]:
        """Return the names of layers that get the same setting, as they save one tensor together in some; in order."""
        order = {fqn: index for index, fqn in enumerate(meters[Choice()].ran())}
        together = [shared for meter in meters.values() for shared in meter.sharing()]
        saving = {fqn for meter in meters.values() for fqn, nbytes in meter.by_module().items() if nbytes}
        saving.update(*together)
        names = [fqn for fqn in {*self._packing, *self._quantizing} if fqn in order and fqn in saving]
        groups = _merged([*((fqn,) for fqn in names), *([fqn for fqn in each if fqn in names] for each in together)])
        return sorted(groups, key=lambda group: min(order[fqn] for fqn in group))

    def _rounding(self, groups: list[tuple[str, ...]], exact: Gradients, overall: float) -> Rounding:
        """Error of all gradients, by the layers that quantize alone, and their bits; ``overall``: of all, in the first.

        It is measured in the fewest bits, where it is largest; in more bits those of all layers shrink alike.
        """
        first, *others = self._levels
        every = {first: overall}
        for bits in others:
            every[bits] = sum(self._errors(self._gradients(self._all(Choice(bits=bits))), exact).values())
        fewest = self._levels[-1]
        found = {}
        for names in groups:
            alone = self._gradients(self._all(Choice()) | dict.fromkeys(names, Choice(bits=fewest)))
            part = sum(self._errors(alone, exact).values()) / max(every[fewest], 1e-30)
            found[names] = {bits: part * every[bits] for bits in self._levels}
        return found

    def _input_rounding(self, groups: list[tuple[str, ...]], exact: Gradients) -> Rounding:
        """Error of the gradients of layers that quantize nothing but their input, where their inputs alone are.

        As dropping, that leaves the gradients of all other layers exact.
        """
        found: Rounding = {names: {} for names in groups}
        for bits in self._levels:
            setting = dict.fromkeys(self._packing, Choice(bits=bits)) | dict.fromkeys(self._quantizing, Choice())
            errors = self._errors(self._gradients(setting), exact)
            for names in groups:
                found[names][bits] = sum(errors.get(fqn, 0.0) for fqn in names)
        return found

    def _options(
        self,
        names: tuple[str, ...],
        saved: Mapping[Choice, dict[str, int]],
        dropping: dict[Choice, dict[str, float]],
        rounding: Rounding,
    ) -> list[Option]:
        def nbytes(choice: Choice) -> int:
            return sum(saved[choice][fqn] for fqn in names)

        def packing(like: Choice) -> list[Option]:
            """Ways to pack the inputs where all else is kept ``like`` this, and their error beyond none dropped."""
            packed = [choice for choice in self._packed() if choice.bits == like.bits]
            errors = [sum(dropping[choice].get(fqn, 0.0) for fqn in names) for choice in packed]
            return [Option(choice, nbytes(choice), error) for choice, error in zip(packed, errors, strict=True)]

        exact, first, *_ = self._undropped()
        most_dropped = self._packed()[0]
        options = packing(exact)
        may_stay_dense = self._gammas[-1] == 0 or options[-1].nbytes > nbytes(exact)
        options = _and_between(options)
        if may_stay_dense:
            options.append(Option(exact, nbytes(exact), 0.0))
        in_first = _and_between([option for option in packing(first) if option.choice.gamma > 0])
        for bits, error in rounding.get(names, {}).items():
            # What is not packed takes so many bytes more than in the first number of bits, whatever gamma is.
            more = nbytes(most_dropped._replace(bits=bits)) - nbytes(most_dropped._replace(bits=first.bits))
            options += [
                Option(each.choice._replace(bits=bits), each.nbytes + more, each.error + error) for each in in_first
            ]
            if may_stay_dense:
                options.append(Option(Choice(bits=bits), nbytes(Choice(bits=bits)), error))
        return options

    def _meter(self, setting: Setting) -> CacheMeter:
        self._configure(setting)
        with _unchanged(self._model), torch.enable_grad(), CacheMeter(self._model, retain=False) as meter:
            output = self._forward()
        del output
        return meter

    def _gradients(self, setting: Setting) -> Gradients:
        """From a step. Once one does not fit, what this and later ones save waits in the host's memory."""
        self._configure(setting)
        found = None
        if not self._offloads:
            try:
                found = self._step()
            except torch.OutOfMemoryError:
                self._offloads = True
        if found is None:  # out of the except clause, whose error would keep the failed step alive
            with save_on_cpu():
                found = self._step()
        self._taken += 1
        if self._on_step is not None:
            self._on_step(self._taken, self._steps)
        return found

    def _step(self) -> Gradients:
        with _unchanged(self._model), torch.enable_grad():
            loss = self._loss_fn(self._forward())
            with _set_aside([*self._model.parameters(), *_leaves(loss)]):
                loss.backward()
                return self._own_gradients()

    def _own_gradients(self) -> Gradients:
        """Each parameter's once: a layer that packs its input counts before others that share a weight with it."""
        named = dict(self._model.named_modules())
        seen: set[Tensor] = set()
        found: Gradients = {}
        for fqn in dict.fromkeys([*self._packing, *named]):
            parameters = dict.fromkeys(named[fqn].parameters(recurse=fqn in self._packing))
            own = [p.grad.to_dense() for p in parameters if p not in seen and p.grad is not None]
            seen.update(parameters)
            if own:
                found[fqn] = own
        return found

    def _errors(self, grads: Gradients, exact: Gradients) -> dict[str, float]:
        """Of each layer's gradients."""
        return {fqn: _square(map(torch.sub, grads[fqn], exact[fqn])) * self._weights[fqn] for fqn in exact}


def _weights(exact: Gradients) -> dict[str, float]:
    """What a squared error of each layer's gradients counts: see the module's docstring."""
    squares = {fqn: _square(own) for fqn, own in exact.items()}
    together, layers = sum(squares.values()), sum(square > 0 for square in squares.values())
    return {fqn: 1 / together + 1 / (layers * square) if square else 0.0 for fqn, square in squares.items()}


def _square(tensors: Iterable[Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)


def _and_between(options: list[Option]) -> list[Option]:
    """Options that differ in gamma, and more of them: bytes go evenly with gamma, and the error less than evenly."""
    filled = options[:1]
    for a, b in pairwise(options):
        for part in (step / _BETWEEN for step in range(1, _BETWEEN + 1)):
            gamma, nbytes, error = (
                x + (y - x) * part for x, y in zip((a.choice.gamma, *a[1:]), (b.choice.gamma, *b[1:]), strict=True)
            )
            filled.append(Option(a.choice._replace(gamma=gamma), nbytes, error))
    return filled


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, if no converted layer is; every module's flag is afterwards what it was.

    In eval mode nothing is dropped or quantized. Parts in eval mode, as a frozen BatchNorm, stay in it.
    """
    if any(module.training for module in model.modules() if is_converted(module)):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train()  # which may freeze parts of the model
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _nothing_at_zero(model: nn.Module) -> Iterator[None]:
    """Small random values for a while to weights that start at zero, as a ViT's head: they let no gradient through."""
    zeros = [
        (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if not name.endswith("bias") and parameter.is_floating_point() and not parameter.any()
    ]
    torch.clear_autocast_cache()  # of what they were
    try:
        with _random_numbers_kept(model):
            torch.manual_seed(0)
            for parameter, data in zeros:
                parameter.data = torch.empty_like(data).normal_(std=0.02)
        yield
    finally:
        for parameter, data in zeros:
            parameter.data = data
        torch.clear_autocast_cache()


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Every tensor in which a backward pass from ``loss`` accumulates a gradient, be it of the model or not."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)


@contextmanager
def _set_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Their gradients and hooks are out of the way of a backward pass, and then back: a hook may step an optimizer."""
    found = list({id(leaf): leaf for leaf in leaves}.values())
    grads = [leaf.grad for leaf in found]
    hooks = [each for leaf in found for each in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks) if each]
    registered = [dict(each) for each in hooks]
    try:
        for leaf in found:
            leaf.grad = None
        for each in hooks:
            each.clear()  # in place, so that their handles still remove them
        yield
    finally:
        for leaf, grad in zip(found, grads, strict=True):
            leaf.grad = grad
        for each, before in zip(hooks, registered, strict=True):
            each.update(before)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modules' attributes, buffers and their values, and random numbers are afterwards what they were before."""
    # A lazy module becomes another in its first forward pass.
    modules = [module for module in model.modules() if not isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    named = [
        (each, dict(each))
        for module in modules
        for each in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers(recurse=False)]
    try:
        with _random_numbers_kept(model):
            yield
    finally:
        for each, before in named:
            for name in each.keys() - before.keys():
                del each[name]
            each.update(before)
        for buffer, value in buffers:
            _put_back(buffer, value)


def _put_back(buffer: Tensor, value: Tensor) -> None:
    """Write only what was changed: autograd would notice a write to a buffer that is saved for backward."""
    if buffer.shape != value.shape:
        buffer.data = value
    elif not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Those of PyTorch, Python and NumPy, and of generators that modules have."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    own = [(value, value.get_state()) for value in attributes if isinstance(value, torch.Generator)]
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng({p.device for p in model.parameters() if p.device.type == "cuda"}), ExitStack() as stack:
        stack.callback(random.setstate, of_python)
        if numpy is not None:
            stack.callback(numpy.random.set_state, of_numpy)
        for generator, state in own:
            stack.callback(generator.set_state, state)
        yield


def _merged(groups: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Groups that share a name, as a layer that is called twice makes them, as one."""
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching] + [set(group).union(*touching)]
    return [tuple(sorted(group)) for group in merged]
