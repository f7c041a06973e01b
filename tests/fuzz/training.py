"""What is done with a network: forward and backward passes, and changes in between. And what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import dropit
from tests.fuzz.networks import Network, random_network


@dataclass(frozen=True)
class Plan:
    """How a network is trained. Each field is a choice that a seed makes."""

    seed: int
    steps: int
    forwards: int
    same_input: bool  # for both forward passes
    autocast: bool
    outer: str  # hooks for saved tensors around the forward passes
    change: str  # what is written to without autograd after the forward pass
    change_again: str  # and between two backward passes
    backward: str
    layout: str  # of the incoming gradients
    retain_grad: bool
    refill: str  # how the inputs are filled anew between steps
    update: str  # how the parameters are changed between steps
    accumulate: bool


@dataclass
class Record:
    """What came of it: ``error`` is what was raised, if anything was."""

    error: str = ""
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    wanted: list[bool] = field(default_factory=list)  # whether each output requires a gradient
    random_state: Tensor = field(default_factory=torch.Tensor)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and the plan. Running it changes the first two: give it copies."""

    plan: Plan
    network: Network
    inputs: list[Tensor]
    device: str = "cpu"

    def __str__(self) -> str:
        forms = (f"{x.dtype} {tuple(x.shape)} strides {x.stride()}" for x in self.inputs)
        wanted = "with" if self.inputs[0].requires_grad else "without"
        return "\n".join([str(self.plan), f"inputs {wanted} gradients: {'; '.join(forms)}", self.network.described()])


_CHANGES = [*[""] * 10, "biases", "vectors", "some", "all", "buffers", "outputs", "inputs"]


def random_plan(rng: Random, seed: int, dtype: torch.dtype) -> Plan:
    """A plan; each of its fields is at its simplest most of the time."""
    return Plan(
        seed=seed,
        steps=rng.choice([1, 1, 2]),
        forwards=rng.choice([1, 1, 1, 1, 2]),
        same_input=rng.random() < 0.5,
        autocast=dtype is torch.float32 and rng.random() < 0.12,
        outer=rng.choice(["", "", "", "", "", "", "", "meter", "cpu"]),
        change=rng.choice(_CHANGES),
        change_again=rng.choice(_CHANGES),
        backward=rng.choice(["together", "together", "together", "apart", "twice", "loss", "squares", "some leaves"]),
        layout=rng.choice(["contiguous", "contiguous", "transposed", "expanded", "sliced"]),
        retain_grad=rng.random() < 0.15,
        refill=rng.choice(["", "copy_", "numpy"]),
        update=rng.choice(["", "in place", "data", "sgd"]),
        accumulate=rng.random() < 0.5,
    )


def random_case(seed: int, device: str = "cpu") -> Case:
    """The case of a seed; on any device the same but for the random numbers that are drawn there."""
    rng = Random(seed)
    torch.default_generator.manual_seed(seed)
    dtype = rng.choices([torch.float32, torch.float64, torch.bfloat16], [84, 8, 8])[0]
    plan = random_plan(rng, seed, dtype)
    first = _random_input(rng, dtype)
    second = first if plan.same_input else torch.empty_like(first).copy_(first.flip(0))
    wanted = first.is_floating_point() and rng.random() < 0.6
    network = random_network(rng, first, writable=not wanted and rng.random() < 0.3, autocast=plan.autocast)
    inputs = [first.to(device)] if second is first else [first.to(device), second.to(device)]
    return Case(plan, network.to(device), [x.requires_grad_(wanted) for x in inputs], device)


def _random_input(rng: Random, dtype: torch.dtype) -> Tensor:
    samples = rng.choices([0, 1, 2, 3], [4, 10, 43, 43])[0]
    size = rng.choice([4, 6, 8])
    shapes = [(size * 2,), (rng.choice([3, 5]), size), (rng.choice([2, 3, 4]), rng.choice([4, 5]), rng.choice([4, 6]))]
    shape = (samples, *rng.choices(shapes, [1, 2, 2])[0])
    if len(shape) == 3 and rng.random() < 0.1:
        return torch.randint(10, shape[:2])
    x = torch.randn(shape, dtype=dtype) * rng.choice([1.0, 1.0, 3.0])
    layout = rng.random()
    if layout < 0.12:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x[:, :, ::2] if layout < 0.2 and len(shape) > 2 else x


def train(case: Case) -> Record:
    """Do what the plan says with the network and the inputs of ``case``."""
    record = Record()
    torch.manual_seed(case.plan.seed)
    noise = torch.Generator().manual_seed(case.plan.seed)
    try:
        for number in range(case.plan.steps):
            if number > 0:
                _between_steps(case, noise)
            _step(case, record, noise, number)
            _note_gradients(case, record, number)
    except Exception as error:  # whatever it is, the other run is to raise as well
        record.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    named = [*case.network.named_parameters(), *case.network.named_buffers(), *_named_inputs(case)]
    record.state = {name: tensor.detach().clone() for name, tensor in named}
    record.random_state = torch.get_rng_state() if case.device == "cpu" else torch.cuda.get_rng_state()
    return record


@contextmanager
def _surroundings(case: Case) -> Iterator[None]:
    """What is around the forward passes."""
    with ExitStack() as stack:
        if case.plan.autocast:
            stack.enter_context(torch.autocast(case.device, torch.bfloat16))
        if case.plan.outer == "meter":
            stack.enter_context(dropit.CacheMeter(case.network))
        if case.plan.outer == "cpu":
            stack.enter_context(save_on_cpu())
        yield


def _step(case: Case, record: Record, noise: torch.Generator, number: int) -> None:
    plan = case.plan
    with _surroundings(case):
        outputs = [y for turn in range(plan.forwards) for y in case.network(case.inputs[turn % len(case.inputs)])]
    record.outputs += [y.detach().clone() for y in outputs]
    record.wanted += [y.requires_grad for y in outputs]
    targets = [y for y in outputs if y.requires_grad]
    if plan.retain_grad:
        for y in targets:
            y.retain_grad()
    if not targets:
        return
    grads = [_laid_out(plan.layout, noise_like(y, noise)) for y in targets]
    _change(plan.change, case, outputs, noise)
    _backward(case, record, targets, grads, noise)
    if plan.retain_grad:
        retained = {f"step {number} output {index}": y.grad for index, y in enumerate(targets)}
        record.gradients |= {name: grad.clone() for name, grad in retained.items() if grad is not None}


def _backward(case: Case, record: Record, targets: list[Tensor], grads: list[Tensor], noise: torch.Generator) -> None:
    match case.plan.backward:
        case "together":
            torch.autograd.backward(targets, grads)
        case "apart":
            for number, (y, grad) in enumerate(zip(targets, grads, strict=True)):
                y.backward(grad, retain_graph=number + 1 < len(targets))
        case "twice":
            torch.autograd.backward(targets, grads, retain_graph=True)
            _change(case.plan.change_again, case, targets, noise)
            torch.autograd.backward(targets, grads)
        case "loss":
            torch.stack([(y * grad).sum() for y, grad in zip(targets, grads, strict=True)]).sum().backward()
        case "squares":
            torch.stack([y.float().square().sum() for y in targets]).sum().backward()
        case "some leaves":
            leaves = {name: leaf for name, leaf in _named_leaves(case) if leaf.requires_grad}
            some = {name: leaf for number, (name, leaf) in enumerate(leaves.items()) if (number + case.plan.seed) % 3}
            some = some or leaves
            found = torch.autograd.grad(targets, list(some.values()), grads, allow_unused=True)
            pairs = zip(some, found, strict=True)
            record.gradients |= {f"{len(record.outputs)} {name}": grad for name, grad in pairs if grad is not None}


def _change(kind: str, case: Case, outputs: list[Tensor], noise: torch.Generator) -> None:
    """Write to some tensors without autograd's graph, which notes the change."""
    parameters = list(case.network.parameters())
    targets = {
        "": [],
        "biases": [p for name, p in case.network.named_parameters() if name.endswith("bias")],
        "vectors": [p for p in parameters if p.dim() == 1],
        "some": parameters[case.plan.seed % 3 :: 3],
        "all": parameters,
        "buffers": [b for b in case.network.buffers() if b.is_floating_point()],
        "outputs": outputs[:1],
        "inputs": [x for x in case.inputs if x.is_floating_point()],
    }[kind]
    with torch.no_grad():
        for tensor in targets:
            tensor.add_(noise_like(tensor, noise), alpha=0.2)


def _between_steps(case: Case, noise: torch.Generator) -> None:
    for x in case.inputs:
        if case.plan.refill and x.is_floating_point():
            _refill(case.plan.refill, x, noise_like(x, noise))
    if not case.plan.accumulate:
        case.network.zero_grad()
    for parameter in case.network.parameters():
        if parameter.requires_grad:
            _update(case.plan.update, parameter, noise_like(parameter, noise))


def _refill(how: str, x: Tensor, fresh: Tensor) -> None:
    if how == "numpy" and x.dtype is not torch.bfloat16 and x.device.type == "cpu":
        x.detach().numpy()[...] = fresh.numpy()  # autograd does not see it
    else:
        with torch.no_grad():
            x.copy_(fresh)


def _update(how: str, parameter: nn.Parameter, direction: Tensor) -> None:
    """By an optimizer, or by hand; not along the gradient, so that what follows does not depend on its error."""
    if how == "data":
        parameter.data.add_(direction, alpha=0.1)
    elif how == "in place":
        with torch.no_grad():
            parameter.add_(direction, alpha=0.1)
    elif how == "sgd":
        gradient, parameter.grad = parameter.grad, direction
        torch.optim.SGD([parameter], lr=0.1).step()
        parameter.grad = gradient


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers, the same on any device, of the form of ``x``."""
    return torch.randn(x.shape, generator=generator).to(x)


def _laid_out(layout: str, grad: Tensor) -> Tensor:
    """A gradient in some layout; one that is expanded is the same for all samples."""
    if layout == "transposed":
        return grad.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "expanded":
        return grad[:1].expand_as(grad) if len(grad) else grad
    return torch.stack([grad, grad], -1)[..., 0] if layout == "sliced" else grad


def _named_inputs(case: Case) -> list[tuple[str, Tensor]]:
    return [(f"input {number}", x) for number, x in enumerate(case.inputs)]


def _named_leaves(case: Case) -> list[tuple[str, Tensor]]:
    return [*case.network.named_parameters(), *_named_inputs(case)]


def _note_gradients(case: Case, record: Record, number: int) -> None:
    for name, leaf in _named_leaves(case):
        if leaf.grad is not None:
            record.gradients[f"step {number} {name}"] = leaf.grad.clone()
