"""Random networks of some 30 kinds of modules in random wiring. All is decided by one ``random.Random``.

A network is a list of steps. Each reads values that earlier steps gave, and gives one. It is built by running it: a
step that does not fit the shapes, or that plain PyTorch refuses, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import functions, hooks, modules

Function = Callable[..., Tensor]
LARGEST = 1200  # elements of a value


@dataclass(frozen=True)
class Step:
    """What gives the next value: a layer, by its number, or a function, of the values that it reads."""

    reads: tuple[int, ...]
    function: Function | None = None
    layer: int | None = None

    def __str__(self) -> str:
        name = f"layers.{self.layer}" if self.function is None else functions.name_of(self.function)
        return f"{name}({', '.join(f'v{index}' for index in self.reads)})"


class Graph(nn.Module):
    """Steps, and the layers that they call. Returns the last value."""

    def __init__(self, steps: list[Step], layers: list[nn.Module]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(layers)

    def values(self, x: Tensor) -> list[Tensor]:
        """What each step gives, the input first."""
        if not self.steps:  # never; but as this names a function, to_dropit has the calls of all steps taken
            return [F.relu(x)]
        values = [x]
        for step in self.steps:
            function = step.function if step.layer is None else self.layers[step.layer]
            values.append(function(*(values[index] for index in step.reads)))
        return values

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)[-1]

    def extra_repr(self) -> str:
        return "\n".join(f"v{number} = {step}" for number, step in enumerate(self.steps, 1))


class Network(Graph):
    """Returns several of the values."""

    def __init__(self, steps: list[Step], layers: list[nn.Module], outputs: tuple[int, ...]) -> None:
        super().__init__(steps, layers)
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self.values(x)
        return tuple(values[index] for index in self.outputs)

    def described(self) -> str:
        """The network, and what of it printing it does not show."""
        odd = [line for name, module in self.named_modules() for line in _oddities(name, module)]
        return "\n".join([f"{self} returns {', '.join(f'v{index}' for index in self.outputs)}", *odd])


def _oddities(name: str, module: nn.Module) -> list[str]:
    own = list(module.parameters(recurse=False))
    frozen = [f"{name} is frozen"] if own and not any(p.requires_grad for p in own) else []
    evaluated = [] if module.training else [f"{name} is in eval mode"]
    return [*frozen, *evaluated, *(f"{name} has the hook {hook}" for hook in hooks.names(module))]


@dataclass
class Value:
    """An example of what a step gives. Those of one ``root`` may share memory."""

    example: Tensor
    root: int
    writable: bool = True


@dataclass
class Builder:
    """Adds steps while they work on the example."""

    rng: Random
    values: list[Value]
    nested: bool = False
    steps: list[Step] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)

    def grow(self, count: int) -> Builder:
        """Try to add so many steps."""
        kinds = [self._module, self._call, self._view, self._write, self._combine, self._call_again]
        weights = [12, 4, 4, 2.5, 4, 1.5]
        if not self.nested:
            kinds, weights = [*kinds, self._segment], [*weights, 2.5]
        for _ in range(count):
            self.rng.choices(kinds, weights)[0]()
        return self

    def finish(self) -> Builder:
        """Have a layer with a weight, without which nothing is converted."""
        weighted = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
        if not any(isinstance(module, weighted) for layer in self.layers for module in layer.modules()):
            places = reversed(range(len(self.values)))
            any(self.add_layer(nn.Linear(self.values[place].example.shape[-1], 4), place) for place in places)
        return self

    def _pick(self) -> int:
        """The last value, mostly, or one before it."""
        last = len(self.values) - 1
        return last if self.rng.random() < 0.75 else self.rng.randint(max(0, last - 4), last)

    def _add(self, step: Step, function: Function, *, root: int | None, writable: bool = True) -> bool:
        examples = [self.values[index].example for index in step.reads]
        try:
            with torch.no_grad():
                example = function(*examples)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return False
        empty = 0 in example.shape and 0 not in self.values[0].example.shape
        if empty or not 2 <= example.dim() <= 5 or example.numel() > LARGEST:
            return False
        self.steps.append(step)
        self.values.append(Value(example, len(self.values) if root is None else root, writable))
        return True

    def add_layer(self, layer: nn.Module, *reads: int) -> bool:
        layer = layer.to(self._dtype())
        number = len(self.layers)
        same = functions.may_return_its_input(layer)
        root = self.values[reads[0]].root if same else None
        writable = self.values[reads[0]].writable if same else True
        self.layers.append(layer)
        if self._add(Step(reads, layer=number), layer, root=root, writable=writable):
            return True
        self.layers.pop()
        return False

    def _dtype(self) -> torch.dtype:
        example = self.values[0].example
        return example.dtype if example.is_floating_point() else torch.get_default_dtype()

    def _module(self) -> bool:
        index = self._pick()
        value = self.values[index]
        layer = modules.module_for(self.rng, value.example)
        if layer is None or (functions.writes(layer) and not value.writable):
            return False
        hooks.add_some(self.rng, layer)
        return self.add_layer(layer, index)

    def _call_again(self) -> bool:
        if not self.layers:
            return False
        number, index = self.rng.randrange(len(self.layers)), self._pick()
        layer = self.layers[number]
        if functions.may_return_its_input(layer) or functions.writes(layer):
            return False
        return self._add(Step((index,), layer=number), layer, root=None)

    def _call(self) -> bool:
        index = self._pick()
        if not self.values[index].example.is_floating_point():
            return False
        function = functions.call_for(self.rng)
        return self._add(Step((index,), function), function, root=None)

    def _view(self) -> bool:
        index = self._pick()
        value = self.values[index]
        function, writable = functions.view_for(self.rng, value.example)
        return self._add(Step((index,), function), function, root=value.root, writable=value.writable and writable)

    def _write(self) -> bool:
        index = self._pick()
        value = self.values[index]
        if not value.writable:
            return False
        function = functions.write_for(self.rng)
        return self._add(Step((index,), function), function, root=value.root)

    def _combine(self) -> bool:
        index = self._pick()
        shape = self.values[index].example.shape
        alike = [other for other, value in enumerate(self.values) if value.example.shape == shape]
        other = self.rng.choice(alike)
        function, writes = functions.combination_for(self.rng)
        if writes and not (self.values[index].writable and self.values[index].root != self.values[other].root):
            return False
        root = self.values[index].root if writes else None
        return self._add(Step((index, other), function), function, root=root)

    def _segment(self) -> bool:
        index = self._pick()
        example = self.values[index].example
        kind = self.rng.choice(list(modules.SEGMENTS))
        # What runs twice must not write to what it is given.
        start = Value(example.clone(), 0, writable=False)
        inner = Builder(self.rng, [start], nested=True).grow(self.rng.randint(1, 4))
        if not inner.steps:
            return False
        segment = modules.SEGMENTS[kind](self.rng, Graph(inner.steps, inner.layers))
        # Its output may be its input, or a view of it.
        return self._add_segment(segment, index, root=self.values[index].root if inner.values[-1].root == 0 else None)

    def _add_segment(self, segment: nn.Module, index: int, root: int | None) -> bool:
        self.layers.append(segment)
        writable = root is None or self.values[index].writable
        if self._add(Step((index,), layer=len(self.layers) - 1), segment, root=root, writable=writable):
            return True
        self.layers.pop()
        return False


def random_network(rng: Random, x: Tensor, *, writable: bool, autocast: bool) -> Network:
    """A network for inputs like ``x``, to whose memory it writes only if that is ``writable``."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        builder = Builder(rng, [Value(x.clone(), 0, writable)])
        if not x.is_floating_point():
            builder.add_layer(nn.Embedding(10, rng.choice([4, 8]), padding_idx=rng.choice([None, 0])), 0)
        builder.grow(rng.randint(3, 9)).finish()
    last = len(builder.values) - 1
    outputs = [last]
    if rng.random() < 0.3:
        outputs.append(rng.randint(1, last))
    network = Network(builder.steps, builder.layers, tuple(outputs))
    _freeze_some(rng, network)
    return network


def _freeze_some(rng: Random, network: nn.Module) -> None:
    kind = rng.random()
    for parameter in network.parameters():
        if kind < 0.12 and rng.random() < 0.4:
            parameter.requires_grad_(False)
    if 0.12 <= kind < 0.2:
        for module in network.modules():
            if rng.random() < 0.3:
                module.train(False)
