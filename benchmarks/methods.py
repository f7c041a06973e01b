"""The ways to save less that the benchmarks compare, as functions that convert a model in place and return it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from published import to_published
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import dropit

Method = Callable[[nn.Module], nn.Module]
BLOCKS = (
    torchvision.models.resnet.BasicBlock,
    torchvision.models.resnet.Bottleneck,
    torchvision.models.convnext.CNBlock,
    torchvision.models.vision_transformer.EncoderBlock,
)
QUANTIZING = ("int8", "int4", "int2")  # with nothing dropped
OURS = ("dropping", *QUANTIZING)
BUDGET = 0.5  # of what torch.compile would hold to recompute nothing


def checkpointed(model: nn.Module) -> nn.Module:
    """Recompute each block in backward. By the reentrant form, whose saved inputs autograd's hooks see."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    for module in model.modules():
        if isinstance(module, BLOCKS):
            inner = module.forward
            module.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=True)  # type: ignore[method-assign]
    return model


def offloaded(model: nn.Module) -> nn.Module:
    """Copy all that is saved to the host's memory, and back."""
    inner = model.forward

    def forward(x: torch.Tensor) -> object:
        with save_on_cpu(pin_memory=True):
            return inner(x)

    model.forward = forward  # type: ignore[method-assign]
    return model


def compiled(model: nn.Module, budget: float = 1.0) -> nn.Module:
    """torch.compile; with a budget below 1 it recomputes so that it holds that part of what it would."""
    torch._functorch.config.activation_memory_budget = budget  # type: ignore[attr-defined]
    model.compile()
    return model


def methods(strategy: str = "fastmink", gamma: float = 0.9) -> dict[str, Method]:
    """By name; the plain model first. ``strategy`` and ``gamma`` are of those that drop; "channels" drop whole ones."""
    found: dict[str, Method] = {
        "plain": lambda model: model,
        "checkpointing": checkpointed,
        "published scheme": lambda model: to_published(model, gamma),
        "compiled": compiled,
        "compiled, half": lambda model: compiled(model, BUDGET),
        "save_on_cpu": offloaded,
    }
    found["dropping"] = lambda model: dropit.to_dropit(model, strategy, gamma)
    found["channels"] = lambda model: dropit.to_dropit(model, "mink_c", gamma)
    found["channels, int8"] = lambda model: dropit.to_dropit(model, "mink_c", gamma, value_dtype="int8")
    for compress in QUANTIZING:
        found[compress] = lambda model, compress=compress: dropit.to_dropit(model, gamma=0, compress=compress)
    for name in OURS[:2]:
        found[f"compiled {name}"] = lambda model, name=name: compiled(found[name](model))
    return found


USUAL = ("plain", "checkpointing", "published scheme", *OURS)
