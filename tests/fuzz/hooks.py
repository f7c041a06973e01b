"""Hooks for modules: they watch, scale, copy or write."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn


def _watch(*_: Any) -> None:
    pass


def _scale_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.25


def _write_output(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.5)


def _write_output_without_graph(module: nn.Module, args: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.add_(0.1)


def _copy_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clone()


def _scale_gradient_of_output(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_half)


def _lay_gradient_out_anew(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_transposed_in_memory)


def _half(grad: Tensor) -> Tensor:
    return grad * 0.5


def _transposed_in_memory(grad: Tensor) -> Tensor:
    return grad.transpose(0, -1).contiguous().transpose(0, -1)


def _scale_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] * 0.75


def _scale_grad_input(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(grad if grad is None else grad * 1.5 for grad in grad_input)


def _scale_grad_output(module: nn.Module, grad_output: Any) -> Any:
    return tuple(grad if grad is None else grad * 1.5 for grad in grad_output)


_FORWARD = (
    _watch,
    _scale_output,
    _write_output,
    _write_output_without_graph,
    _copy_output,
    _scale_gradient_of_output,
    _lay_gradient_out_anew,
)
_WRITING = (_write_output, _write_output_without_graph)


def add_some(rng: Random, module: nn.Module) -> None:
    """Add a hook to one module in eight, or to one inside it."""
    if rng.random() > 0.12:
        return
    # A TransformerEncoderLayer or an attention module gives no single tensor within.
    inner = [part for part in module.modules() if type(part).__module__.startswith("torch.nn.modules")]
    inner = [part for part in inner if not isinstance(part, (nn.MultiheadAttention, nn.ModuleList))] or [module]
    place = rng.choice(inner)
    kind = rng.random()
    if kind < 0.65:
        place.register_forward_hook(rng.choice(_FORWARD))
    elif kind < 0.75:
        place.register_forward_pre_hook(_scale_input)
    elif kind < 0.9:
        place.register_full_backward_hook(rng.choice((_watch, _scale_grad_input)))
    else:
        place.register_full_backward_pre_hook(rng.choice((_watch, _scale_grad_output)))


def has_any(module: nn.Module) -> bool:
    """Whether a hook was added to the module itself."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_writing_hook(module: nn.Module) -> bool:
    """Whether a hook writes to the module's output."""
    written: list[Callable[..., Any]] = list(module._forward_hooks.values())
    return any(hook in _WRITING for hook in written)


def names(module: nn.Module) -> list[str]:
    """The hooks of the module itself."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook.__name__.lstrip("_") for kind in kinds for hook in kind.values()]
