"""Judges a seed: the plain network is trained, and copies that are converted; all are to come to the same.

- Where plain raises nothing, the others raise nothing: the same outputs, buffers and random numbers afterwards, bit for
  bit; the same gradients bit for bit where nothing is dropped or quantized, and within a tolerance with 16 bits.
- Where plain raises, the others raise, or give the gradients of the time of the forward pass, which plain gives if it
  saves copies: what is stored as a copy cannot be overwritten, but nothing else may come of it.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from random import Random

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import dropit
from tests.fuzz.modules import Checkpointed, Within
from tests.fuzz.training import Case, Record, noise_like, random_case, train

BATCH_NORM = nn.modules.batchnorm._BatchNorm
ROUNDING = 1e-5  # of other kernels on copies; of sums in another order


@dataclass(frozen=True)
class Failure:
    """What is wrong with a seed, in one line."""

    seed: int
    mode: str
    reason: str

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.mode}: {self.reason}"


def judge(seed: int, device: str = "cpu") -> list[Failure]:
    """Train the case of ``seed`` in all ways, and say what differs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = random_case(seed, device)
        if case.plan.outer and train(_without_outer_hooks(case)).error:
            return []  # such hooks keep a change from being noticed, and what plain then computes is no measure
        plain = _Plain(case)
        modes = {"lossless": _lossless, "int16": _int16, "dropped": _dropped}
        reasons = {mode: compare(plain) for mode, compare in modes.items()}
    return [Failure(seed, mode, reason) for mode, reason in reasons.items() if reason]


class _Plain:
    """A case, what plain training makes of it, and how much that depends on rounding."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.record = train(copy.deepcopy(case))
        # What the others are to come to, if they raise nothing.
        self.expected = self.record if not self.record.error else _train_on_copies(case)

    def sensitivity(self, size: float) -> dict[str, float]:
        """How far each gradient moves, relatively, when all that it is computed from is off by ``size``."""
        moved = self._rounding()
        # Checkpoints keep hooks from what they save, and without them what is computed again is of another time.
        for checkpoints, number in product((True, False), range(3)):
            exact = _train_perturbed(self.case, 0.0, number, checkpoints).gradients
            apart = distances(_train_perturbed(self.case, size, number, checkpoints).gradients, exact)
            moved = {name: max(moved.get(name, 0.0), apart.get(name, 0.0)) for name in moved | apart}
        return moved

    def _rounding(self) -> dict[str, float]:
        """How far each gradient is from that in float64; no less than a part of how far any is, in absolute terms.

        Where the largest is nothing but rounding, as behind a normalization of constants, so are the others.
        """
        if any(isinstance(module, nn.RMSNorm) and module.eps is None for module in self.case.network.modules()):
            return {}  # its eps is that of the dtype
        expected = self.expected.gradients
        apart = distances(_train_in_double(self.case).gradients, expected)
        scales = scales_of(expected)
        most = max((apart[name] * scales[name] for name in apart), default=0.0)
        return {name: max(apart[name], most / SLACK / scales[name]) if scales[name] else 0.0 for name in apart}


def _lossless(plain: _Plain) -> str:
    record = train(_converted(plain.case, gamma=0.0, compress="lossless"))
    reason = _compared(plain, record) or _gradients_differ(plain, record, 0.0 if not plain.record.error else ROUNDING)
    return "" if reason.startswith("gradient") and _hides_a_write(plain) else reason


def _int16(plain: _Plain) -> str:
    record = train(_converted(plain.case, gamma=0.0, compress="int16"))
    tolerance = _tolerance(plain.case)
    reason = _compared(plain, record) or _gradients_differ(plain, record, tolerance)
    if not reason.startswith("gradient"):
        return reason
    if _hides_a_write(plain):
        return ""
    case = plain.case
    for another in (_with_outputs_of_their_own, _with_contiguous_batch_norm):
        case = another(case)
        reason = reason and _gradients_differ(_Plain(case), record, tolerance)
    return reason


def _hides_a_write(plain: _Plain) -> bool:
    """Whether a checkpoint keeps plain from seeing that its part writes over what it saved.

    What comes of it then depends on when, within each operation, it is saved.
    """
    case = plain.case
    plan = replace(case.plan, outer="", change="", change_again="", steps=1)
    return not plain.record.error and bool(train(_without_checkpoints(replace(case, plan=plan))).error)


def _dropped(plain: _Plain) -> str:
    rng = Random(plain.case.plan.seed)
    strategy = rng.choice(["fastmink", "fastmink", *dropit.STRATEGIES])
    options = {"compress": rng.choice(["int8", "int8", "int4"]), "value_dtype": rng.choice([None, "bf16", "int8"])}
    options |= rng.choice([{"gamma": 0.9}, {"gamma": 0.9}, {"gamma": 0.0}, {"gamma": 0.0, "compress": "int2"}])
    record = train(_converted(plain.case, strategy=strategy, **options))
    reason = _compared(plain, record)
    return f"{strategy}, {options}: {reason}" if reason else ""


def _compared(plain: _Plain, record: Record) -> str:
    """What differs besides gradients."""
    if record.error:
        return "" if plain.record.error else f"raises {record.error}"
    expected = plain.expected
    if expected.error:
        return f"raises nothing, where plain raises {expected.error}"
    if record.wanted != expected.wanted:
        return f"outputs require gradients {record.wanted}, not {expected.wanted}"
    for number, (ours, theirs) in enumerate(zip(record.outputs, expected.outputs, strict=True)):
        if not equal(ours, theirs):
            return f"output {number} is off by {_distance(ours, theirs):.2g} ({_form(ours)}, not {_form(theirs)})"
    for name, theirs in expected.state.items():
        if not equal(record.state[name], theirs):
            return f"{name} is off by {_distance(record.state[name], theirs):.2g} afterwards"
    if not torch.equal(record.random_state, expected.random_state):
        return "the random numbers that follow differ"
    if record.gradients.keys() != expected.gradients.keys():
        return f"other gradients: {sorted(record.gradients.keys() ^ expected.gradients.keys())}"
    return ""


def _gradients_differ(plain: _Plain, record: Record, tolerance: float) -> str:
    """Which gradients are further apart than that, and than rounding alone moves them."""
    if record.error:
        return ""
    expected = plain.expected.gradients
    forms = (
        f"{name} is {_form(record.gradients[name])}, not {_form(grad)}"
        for name, grad in expected.items()
        if _form(record.gradients[name]) != _form(grad)
    )
    other = next(forms, "")
    if other or (not tolerance and all(equal(record.gradients[name], grad) for name, grad in expected.items())):
        return other
    apart = distances(record.gradients, expected)
    if tolerance:
        apart = {name: distance for name, distance in apart.items() if distance > tolerance}
        allowed = partial(_allowed, plain.sensitivity(_perturbation(plain.case)) if apart else {})
        apart = {name: distance for name, distance in apart.items() if not distance <= allowed(name)}
    name = max(apart, key=lambda name: apart[name], default="")
    if not name:
        return ""
    rounded = tolerance == 0 and apart[name] < _tolerance(plain.case) / 3
    return f"gradient of {name} is off by {apart[name]:.2g}{', as by rounding' if rounded else ''}"


SLACK = 10  # how much further a gradient may move than by a perturbation of the inputs and parameters


def _allowed(sensitivity: dict[str, float], name: str) -> float:
    return SLACK * sensitivity.get(name, 0.0)


def _is_half(case: Case) -> bool:
    half = any(parameter.dtype is torch.bfloat16 for parameter in case.network.parameters())
    return half or case.plan.autocast or any(isinstance(module, Within) for module in case.network.modules())


def _tolerance(case: Case) -> float:
    return 2e-2 if _is_half(case) else 1e-3


def _perturbation(case: Case) -> float:
    return 2e-3 if _is_half(case) else 1e-5


def _converted(case: Case, **options: object) -> Case:
    case = copy.deepcopy(case)
    dropit.to_dropit(case.network, **options)  # type: ignore[arg-type]
    return case


def _without_outer_hooks(case: Case) -> Case:
    case = copy.deepcopy(case)
    return replace(case, plan=replace(case.plan, outer=""))


def _with_contiguous_batch_norm(case: Case) -> Case:
    """The case, with no layouts for which the gradients of PyTorch's batch normalization are wrong on a CPU (2.14)."""
    case = copy.deepcopy(case)
    for module in case.network.modules():
        if isinstance(module, BATCH_NORM):
            module.register_forward_pre_hook(lambda module, args: _copied(args[0]))
            module.register_forward_hook(lambda module, args, output: _with_copied_gradient(output), prepend=True)
    return case


def _with_outputs_of_their_own(case: Case) -> Case:
    """The case, where what a Linear or attention returns is no view, as which PyTorch (2.14) returns it.

    A view that is changed in place loses its hooks, and retains the gradient of its own elements alone.
    """
    case = copy.deepcopy(case)
    for module in case.network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: output.clone(), prepend=True)
        elif isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(lambda module, args, output: (output[0].clone(), output[1]), prepend=True)
    return case


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _copied_alike(x: Tensor) -> Tensor:
    """A copy with the same strides, on which some of PyTorch's gradients depend."""
    x = x.detach()
    if 0 in x.stride() or x.numel() == 0:
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _with_copied_gradient(output: Tensor) -> Tensor:
    if output.requires_grad:
        output.register_hook(_copied)
    return output


def _train_on_copies(case: Case) -> Record:
    """Plain training that saves copies: no change in place reaches them."""
    case = copy.deepcopy(case)
    with saved_tensors_hooks(_copied_alike, lambda saved: saved) if not case.plan.outer else nullcontext():
        return train(case)


def _train_in_double(case: Case) -> Record:
    """Plain training in float64, on copies."""
    case = copy.deepcopy(case)
    inputs = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in case.inputs]
    return _train_on_copies(
        replace(case, plan=replace(case.plan, autocast=False), network=case.network.double(), inputs=inputs)
    )


def _without_checkpoints(case: Case) -> Case:
    case = copy.deepcopy(case)
    for module in case.network.modules():
        if isinstance(module, Checkpointed):
            module.active = False
    return case


def _train_perturbed(case: Case, size: float, number: int, checkpoints: bool) -> Record:
    """Plain training where inputs, parameters and all that is saved for backward are off by ``size``."""
    case = _without_outer_hooks(case if checkpoints else _without_checkpoints(case))
    generator = torch.Generator().manual_seed(number)

    def perturbed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return _copied_alike(tensor)
        exact = (tensor == 0) | ~tensor.isfinite()  # not by rounding
        largest = tensor.masked_fill(exact, 0).abs().max()
        noise = noise_like(tensor, generator)
        return _copied_alike(tensor).add_(noise.masked_fill_(exact, 0) * largest, alpha=size)

    with torch.no_grad():
        for tensor in [*case.network.parameters(), *case.inputs]:
            tensor.copy_(perturbed(tensor.detach()))
    with saved_tensors_hooks(lambda saved: perturbed(saved.detach()), lambda saved: saved):
        return train(case)


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same; NaN is."""
    if _form(ours) != _form(theirs):
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """How far each of several gradients is from the other, relative to its scale."""
    scales = scales_of(theirs)
    return {name: _distance(ours[name], grad, scales[name]) for name, grad in theirs.items() if name in ours}


def scales_of(gradients: dict[str, Tensor]) -> dict[str, float]:
    """The norm of each, or a part of the largest of all norms where that is more."""
    norms = {name: _norm(grad) for name, grad in gradients.items()}
    least = 1e-2 * max(norms.values(), default=0.0)
    return {name: max(norm, least) for name, norm in norms.items()}


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().nan_to_num(0.0, 0.0, 0.0).norm())


def _distance(ours: Tensor, theirs: Tensor, scale: float | None = None) -> float:
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return torch.inf
    scale = _norm(theirs) if scale is None else scale
    difference = _norm(ours.double() - theirs.double())
    return difference / scale if scale else difference
