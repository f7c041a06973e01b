"""Scaled dot-product attention that keeps its queries, keys and values in few bits, and nothing of its output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dropit import ops
from dropit.layers.layer import first_order_only
from dropit.packed import Layout, Packed
from dropit.packer import Packer


class DropITAttentionFunction(Function):
    """Scaled dot-product attention. Saves q, k and v, packed, and computes the rest again in backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float,
        is_causal: bool,
        random: Tensor | None,
        *parts: Any,
    ) -> Tensor:
        """The plain forward; ``parts`` are those of the packed q, k and v, ``random`` the generator's state."""
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the packed q, k, v, the mask and the state of the random numbers."""
        _, _, _, mask, ctx.dropout, ctx.is_causal, random, *parts = inputs
        tensors = [part for part in parts if not isinstance(part, Layout)]
        ctx.layouts = [part for part in parts if isinstance(part, Layout)]
        ctx.save_for_backward(mask, random, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, heads, L, head_dim)."""
        mask, random, *tensors = ctx.saved_tensors
        q, k, v = (
            ops.unpack(Packed(values, positions, scales, layout))
            for values, positions, scales, layout in zip(
                tensors[::3], tensors[1::3], tensors[2::3], ctx.layouts, strict=True
            )
        )
        # PyTorch's own kernel is the faster one, but cannot be differentiated within a graph that is being traced.
        if _traced() and ctx.dropout == 0:
            grads = _gradients(q, k, v, mask, ctx.is_causal, grad_output)
        else:
            grads = _gradients_by_autograd(q, k, v, mask, ctx.dropout, ctx.is_causal, random, grad_output)
        return *(first_order_only(grad) for grad in grads), *[None] * 16


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def dropit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, packer: Packer
) -> Tensor:
    """``F.scaled_dot_product_attention`` that keeps q, k and v in ``packer.bits`` bits; no gradient of the mask."""
    parts = (part for x in (q, k, v) for part in packer.quantize(x))
    random = _random_state(q.device) if dropout > 0 else None
    return DropITAttentionFunction.apply(q, k, v, mask, dropout, is_causal, random, *parts)  # type: ignore[no-any-return]


def _gradients_by_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    random: Tensor | None,
    grad_output: Tensor,
) -> tuple[Tensor, ...]:
    with torch.enable_grad(), torch.random.fork_rng(_cuda_devices(grad_output), enabled=random is not None):
        if random is not None:
            _set_random_state(random, grad_output.device)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return torch.autograd.grad(output, (q, k, v), grad_output)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, grad_output: Tensor
) -> tuple[Tensor, ...]:
    """By the formulas, with the weights (N, heads, L, S) in memory for a while."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    grad_weights = grad_output @ v.transpose(-2, -1)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
    return grad_scores @ k, grad_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad_output


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _cuda_devices(x: Tensor) -> list[int]:
    return [x.device.index] if x.is_cuda else []
