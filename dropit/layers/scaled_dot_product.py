"""Scaled dot-product attention and the projection of its output, which keep queries, keys and values in few bits.

Nothing else is kept: the backward pass attends again, which gives it the projection's input as well. That one is not
dropped from, then, and takes no memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dropit import ops
from dropit.layers.layer import autocast, first_order_only, is_traced
from dropit.packed import Layout, Packed
from dropit.packer import Packer


class DropITAttentionFunction(Function):
    """y = attention(q, k, v) W^T + b, with the heads side by side."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        dropout: float,
        is_causal: bool,
        random: Tensor | None,
        *parts: Any,
    ) -> Tensor:
        """The plain forward; ``parts`` are those of the packed q, k and v, ``random`` the generator's state."""
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return F.linear(_side_by_side(context), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the packed q, k, v, the weight, the mask and the state of the random numbers."""
        _, _, _, weight, _, mask, ctx.dropout, ctx.is_causal, random, *parts = inputs
        tensors = [part for part in parts if not isinstance(part, Layout)]
        ctx.layouts = [part for part in parts if isinstance(part, Layout)]
        ctx.save_for_backward(weight, mask, random, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (L, N, E)."""
        weight, mask, random, *tensors = ctx.saved_tensors
        forms = zip(tensors[::3], tensors[1::3], tensors[2::3], ctx.layouts, strict=True)
        q, k, v = (ops.unpack(Packed(values, positions, scales, form)) for values, positions, scales, form in forms)
        samples, heads, length, _ = q.shape
        grad_context = (grad_output @ weight).view(length, samples, heads, -1).permute(1, 2, 0, 3)
        # PyTorch's own kernel is the faster one, but cannot be differentiated within a graph that is being traced.
        if is_traced() and ctx.dropout == 0:
            context, *grads = _attend_by_formula(q, k, v, mask, ctx.is_causal, grad_context)
        else:
            context, *grads = _attend_by_kernel(q, k, v, mask, ctx.dropout, ctx.is_causal, random, grad_context)
        grad_weight = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[3]:
            grad_weight = rows.t() @ _side_by_side(context).reshape(len(rows), -1)
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(dim=0)
        once = [None if grad is None else first_order_only(grad) for grad in (*grads, grad_weight)]
        return *once, grad_bias, *[None] * 16


def _side_by_side(context: Tensor) -> Tensor:
    """(N, heads, L, head_dim) -> (L, N, E)."""
    return context.permute(2, 0, 1, 3).reshape(context.shape[2], context.shape[0], -1)


def dropit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    packer: Packer,
) -> Tensor:
    """Attention over (N, heads, L, head_dim), projected: (L, N, E). Keeps q, k, v in ``packer.bits`` bits.

    ``mask`` gets no gradient.
    """
    parts = (part for x in (q, k, v) for part in packer.quantize(x))
    random = _random_state(q.device) if dropout > 0 else None
    _, w, b = autocast(q, weight, bias)
    return DropITAttentionFunction.apply(q, k, v, w, b, mask, dropout, is_causal, random, *parts)  # type: ignore[no-any-return]


def _attend_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    random: Tensor | None,
    grad_context: Tensor,
) -> tuple[Tensor, ...]:
    """The context, and the gradients of q, k and v."""
    devices = [q.device.index] if q.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices, enabled=random is not None):
        if random is not None:
            _set_random_state(random, q.device)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return context.detach(), *torch.autograd.grad(context, (q, k, v), grad_context)


def _attend_by_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, grad_context: Tensor
) -> tuple[Tensor, ...]:
    """The same, with the weights (N, heads, L, S) in memory for a while."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    grad_weights = grad_context @ v.transpose(-2, -1)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
    grad_v = weights.transpose(-2, -1) @ grad_context
    return weights @ v, grad_scores @ k, grad_scores.transpose(-2, -1) @ q, grad_v


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
