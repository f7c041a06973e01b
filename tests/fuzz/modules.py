"""Modules for a tensor, and segments of a network that run in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Maker = Callable[[Random, Tensor], nn.Module]


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of one tensor."""

    def __init__(self, rng: Random, size: int) -> None:
        super().__init__()
        heads = rng.choice([h for h in (1, 2, 4) if size % h == 0])
        options = {"bias": rng.random() < 0.8, "add_bias_kv": rng.random() < 0.1, "add_zero_attn": rng.random() < 0.1}
        self.attention = nn.MultiheadAttention(
            size, heads, dropout=rng.choice([0.0, 0.0, 0.3]), batch_first=rng.random() < 0.7, **options
        )
        self.need_weights = rng.random() < 0.3
        self.masked = rng.choice(["", "", "bool", "float", "causal"])

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1 if self.attention.batch_first else 0]
        mask = None
        if self.masked:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if self.masked == "float":
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -2.0)
        causal = self.masked == "causal"
        return self.attention(x, x, x, need_weights=self.need_weights, attn_mask=mask, is_causal=causal)[0]


class FunctionalAttention(nn.Module):
    """Attention as a function, of projections by one Linear or by three."""

    def __init__(self, rng: Random, size: int) -> None:
        super().__init__()
        self.heads = rng.choice([h for h in (1, 2) if size % h == 0])
        self.together = nn.Linear(size, 3 * size) if rng.random() < 0.5 else None
        self.apart = None if self.together else nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.project = nn.Linear(size, size)
        self.dropout = rng.choice([0.0, 0.0, 0.2])
        self.causal = rng.random() < 0.4

    def forward(self, x: Tensor) -> Tensor:
        parts = self.together(x).chunk(3, dim=-1) if self.apart is None else [part(x) for part in self.apart]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.project(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A gated MLP, whose two halves are parts of one tensor."""

    def __init__(self, rng: Random, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 8)
        self.activation = rng.choice([nn.GELU, nn.SiLU, nn.Sigmoid])()
        self.down = nn.Linear(4, size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)


class Block(nn.Module):
    """Norm, activation, layer: what gives each other's inputs back."""

    def __init__(self, norm: nn.Module, activation: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation, self.layer = norm, activation, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.activation(self.norm(x)))


class Functional(nn.Module):
    """An activation that is called as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        return self.function.__name__

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def activation(rng: Random, x: Tensor) -> nn.Module:
    """Any activation, of the lossless ones or of those that are quantized."""
    inplace = rng.random() < 0.3
    return rng.choice(
        [
            lambda: nn.ReLU(inplace),
            lambda: nn.ReLU6(inplace),
            lambda: nn.Hardtanh(-0.7, 0.9, inplace),
            lambda: nn.LeakyReLU(rng.choice([0.01, 0.2, 0.0, -0.1]), inplace),
            lambda: nn.GELU(rng.choice(["none", "tanh"])),
            lambda: nn.SiLU(inplace),
            lambda: nn.Mish(inplace),
            lambda: nn.Hardswish(inplace),
            nn.Sigmoid,
            nn.Tanh,
            lambda: nn.Dropout(rng.choice([0.1, 0.5, 0.5, 0.0, 1.0]), inplace),
            lambda: nn.ELU(1.0, inplace),
            lambda: nn.Softmax(-1),
            lambda: Functional(rng.choice([F.relu, F.gelu, F.silu, torch.tanh])),
            nn.Identity,
        ]
    )()


def linear(rng: Random, x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[-1], rng.choice([x.shape[-1], 3, 4, 8]), bias=rng.random() < 0.7)


def _norm_of_last(rng: Random, x: Tensor) -> nn.Module:
    shape = x.shape[-rng.choice([1, 1, 1, min(2, x.dim() - 1)]) :]
    if rng.random() < 0.4:
        return nn.RMSNorm(shape, eps=rng.choice([None, 1e-5]), elementwise_affine=rng.random() < 0.7)
    return nn.LayerNorm(shape, elementwise_affine=rng.random() < 0.7, bias=rng.random() < 0.7)


def _batch_norm(rng: Random, x: Tensor) -> nn.Module:
    kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    options = {"affine": rng.random() < 0.7, "track_running_stats": rng.random() < 0.8}
    return kind(x.shape[1], momentum=rng.choice([0.1, 0.5, None]), **options)


def _group_norm(rng: Random, x: Tensor) -> nn.Module:
    groups = rng.choice([g for g in (1, 2, 4, x.shape[1]) if x.shape[1] % g == 0])
    return nn.GroupNorm(groups, x.shape[1], affine=rng.random() < 0.7)


def convolution(rng: Random, x: Tensor) -> nn.Module:
    """A convolution of (N, C, L) or (N, C, H, W), or a transposed one."""
    channels = x.shape[1]
    groups = 2 if channels % 2 == 0 and rng.random() < 0.3 else 1
    outside = groups * rng.choice([1, 2, 4])
    options: dict[str, Any] = {"groups": groups, "bias": rng.random() < 0.6}
    kernel = rng.choice([1, 2, 3])
    if 1 in x.shape[2:]:
        kernel = 1  # PyTorch's own weight gradients are memory never written, in bfloat16 on a CPU (2.14)
    if x.dim() == 4 and rng.random() < 0.2:
        return nn.ConvTranspose2d(channels, outside, kernel, stride=rng.choice([1, 2]), **options)
    options["padding"] = rng.choice([0, 1, 1, "same"])
    if options["padding"] != "same":
        stride, dilation = rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        if kernel == 1:
            stride = dilation = 1  # PyTorch's own writes beyond its memory, channels last on a CPU (2.14)
        options |= {"stride": stride, "dilation": dilation}
    if rng.random() < 0.15:
        options["padding_mode"] = rng.choice(["reflect", "replicate", "circular"])
    kind = nn.Conv2d if x.dim() == 4 else nn.Conv1d
    return kind(channels, outside, kernel, **options)


def _pool(rng: Random, x: Tensor) -> nn.Module:
    if x.dim() == 3:
        return rng.choice([nn.MaxPool1d(2, 1), nn.AvgPool1d(2, 1), nn.AdaptiveAvgPool1d(2), nn.AdaptiveAvgPool1d(1)])
    maximum = nn.MaxPool2d(
        rng.choice([2, 3, (2, 1)]), rng.choice([1, 2]), padding=rng.choice([0, 1]), ceil_mode=rng.random() < 0.3
    )
    average = nn.AvgPool2d(2, rng.choice([1, 2]), ceil_mode=rng.random() < 0.3)
    return rng.choice([maximum, maximum, average, nn.AdaptiveAvgPool2d(rng.choice([1, 2, (2, None)]))])


def _attention(rng: Random, x: Tensor) -> nn.Module:
    return rng.choice([SelfAttention, FunctionalAttention])(rng, x.shape[-1])


def _transformer(rng: Random, x: Tensor) -> nn.Module:
    size = x.shape[-1]
    return nn.TransformerEncoderLayer(
        size,
        rng.choice([h for h in (1, 2) if size % h == 0]),
        dim_feedforward=8,
        dropout=rng.choice([0.0, 0.2]),
        activation=rng.choice(["relu", "gelu", F.silu]),
        batch_first=rng.random() < 0.7,
        norm_first=rng.random() < 0.5,
    )


def _gated(rng: Random, x: Tensor) -> nn.Module:
    return Gated(rng, x.shape[-1])


def _block(rng: Random, x: Tensor) -> nn.Module:
    channels_first = x.dim() == 4 or (x.dim() == 3 and rng.random() < 0.3)
    norms = [_batch_norm, _group_norm] if channels_first else [_norm_of_last]
    layer = convolution if channels_first else linear
    return Block(rng.choice(norms)(rng, x), activation(rng, x), layer(rng, x))


_ANY: list[tuple[float, Maker]] = [(5, activation), (3, linear), (2, _norm_of_last), (3, _block), (0.5, _gated)]
_MAKERS: dict[int, list[tuple[float, Maker]]] = {
    2: [*_ANY, (1.5, _batch_norm)],
    3: [
        *_ANY,
        (1, _batch_norm),
        (1, _group_norm),
        (1, convolution),
        (0.7, _pool),
        (2.5, _attention),
        (1, _transformer),
    ],
    4: [*_ANY, (2, _batch_norm), (1, _group_norm), (4, convolution), (2.5, _pool)],
}


def module_for(rng: Random, x: Tensor) -> nn.Module | None:
    """A module that may take ``x``; None where there is none."""
    makers = _MAKERS.get(x.dim())
    if makers is None or 0 in x.shape[1:] or not x.is_floating_point():
        return None
    weights, functions = zip(*makers, strict=True)
    return rng.choices(functions, weights)[0](rng, x)


class Checkpointed(nn.Module):
    """A part that activation checkpointing runs again in backward."""

    def __init__(self, part: nn.Module, **options: bool) -> None:
        super().__init__()
        self.part, self.options = part, options
        self.active = True

    def extra_repr(self) -> str:
        return str(self.options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.part(x)
        return checkpoint(self.part, x, **self.options)


class Within(nn.Module):
    """A part that runs within a context."""

    def __init__(self, part: nn.Module, context: Callable[[str], Any]) -> None:
        super().__init__()
        self.part, self.context = part, context

    def extra_repr(self) -> str:
        return self.context.__name__.lstrip("_")

    def forward(self, x: Tensor) -> Tensor:
        with self.context(x.device.type):
            return self.part(x)


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


def _no_grad(device: str) -> torch.no_grad:
    return torch.no_grad()


def _checkpointed(rng: Random, part: nn.Module) -> nn.Module:
    return Checkpointed(part, use_reentrant=rng.random() < 0.5, preserve_rng_state=rng.random() < 0.85)


def _frozen(rng: Random, part: nn.Module) -> nn.Module:
    return part.requires_grad_(False)


def _evaluated(rng: Random, part: nn.Module) -> nn.Module:
    return part.eval()


SEGMENTS: dict[str, Callable[[Random, nn.Module], nn.Module]] = {
    "checkpointed": _checkpointed,
    "checkpointed again": _checkpointed,
    "without gradients": lambda rng, part: Within(part, _no_grad),
    "in autocast": lambda rng, part: Within(part, _autocast),
    "frozen": _frozen,
    "evaluated": _evaluated,
    "as it is": lambda rng, part: part,
}
