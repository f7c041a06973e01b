"""The ways to hold less that the benchmarks compare, as functions that convert a model in place and return it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from published import to_published
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropit

Method = Callable[[nn.Module], nn.Module]
BLOCKS = (
    torchvision.models.resnet.BasicBlock,
    torchvision.models.resnet.Bottleneck,
    torchvision.models.convnext.CNBlock,
    torchvision.models.vision_transformer.EncoderBlock,
)


def checkpointed(model: nn.Module) -> nn.Module:
    """Recompute each block in backward. By the reentrant form, whose saved inputs autograd's hooks see."""
    for module in model.modules():
        if isinstance(module, BLOCKS):
            inner = module.forward
            module.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=True)  # type: ignore[method-assign]
    return model


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile, allowed half of the memory that it would take to recompute nothing."""
    torch._functorch.config.activation_memory_budget = 0.5  # type: ignore[attr-defined]
    model.compile()
    return model


def methods(strategy: str, gamma: float, *, with_compiled: bool = False) -> dict[str, Method]:
    """By name; the plain model first."""
    ours = {
        compress: lambda model, compress=compress: dropit.to_dropit(model, strategy, gamma, compress=compress)
        for compress in ("lossless", "int8", "int4")
    }
    return {
        "plain": lambda model: model,
        "checkpointing": checkpointed,
        **({"compiled, half": compiled} if with_compiled else {}),
        "published scheme": lambda model: to_published(model, gamma),
        **ours,
    }
