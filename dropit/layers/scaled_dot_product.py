"""Scaled dot-product attention that saves queries, keys and values in few bits, and nothing else.

The backward pass attends again. Where the projection of attention's output is part of it, that gives the projection's
input as well: it is not dropped from, then, and takes no memory.

Dropout's mask is drawn again too. On a CPU a generator of its own draws it, from the state that PyTorch's generator had
in the forward pass. On a GPU only PyTorch's own kernels know how: its generator is set back to that state and, when the
kernel has run, to where it was; another thread that draws from it at that moment draws the same numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dropit import ops
from dropit.layers.formats import as_non_view, autocast
from dropit.layers.function import (
    LayerFunction,
    anchor,
    apply,
    first_order_only,
    none_for_none,
    undefined_gradients_as_none,
)
from dropit.layers.functions import Call, stands_in_for
from dropit.layers.linear import as_rows
from dropit.packed import Layout, Packed
from dropit.saver import Saver
from dropit.tracing import is_mapped, is_traced, saved_as_is


class AttentionArguments(NamedTuple):
    """Arguments of ``F.scaled_dot_product_attention`` besides its tensors."""

    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """PyTorch's function, with these arguments."""
        return F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout, self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa
        )


class DropITScaledDotProductFunction(LayerFunction):
    """y = attention(q, k, v)."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        arguments: AttentionArguments,
        random: Tensor | None,
        anchor: Tensor | None,
        *parts: Any,
    ) -> Tensor:
        """The plain forward; ``parts`` are those of the packed q, k and v, ``random`` tells which weights dropout hid.

        It is the generator's state or, where a graph is compiled, the bits of the mask.
        """
        if mask is None or not mask.requires_grad or torch.compiler.is_compiling():
            return as_non_view(_attend(q, k, v, mask, arguments, random))
        # Which kernel computes depends on whether the mask's gradient is wanted; what it saves is not.
        with torch.enable_grad(), saved_tensors_hooks(lambda _: None, lambda _: None):  # type: ignore[arg-type, return-value]
            return as_non_view(arguments.attend(q, k, v, mask).detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the packed q, k, v, the mask and the state of the random numbers."""
        undefined_gradients_as_none(ctx)
        _, _, _, mask, ctx.arguments, random, anchor, *parts = inputs
        _save(ctx, parts, anchor, mask, random)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (N, heads, L, head_dim)."""
        anchor, *saved = ctx.saved_tensors
        _, *grads = _attend_again(ctx, *saved, grad_context=grad_output, of_mask=ctx.needs_input_grad[3])
        return *(None if grad is None else first_order_only(grad, anchor) for grad in grads), *[None] * 15


class DropITAttentionFunction(LayerFunction):
    """y = attention(q, k, v) W^T + b, with the heads side by side."""

    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        arguments: AttentionArguments,
        random: Tensor | None,
        anchor: Tensor | None,
        *parts: Any,
    ) -> Tensor:
        """The plain forward; ``parts`` and ``random`` as above."""
        context = _side_by_side(_attend(q, k, v, mask, arguments, random))
        rows = F.linear(as_rows(context), weight, bias)  # by rows, as PyTorch has it
        return as_non_view(rows.view(*context.shape[:-1], rows.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what attention alone would, and the weight."""
        undefined_gradients_as_none(ctx)
        _, _, _, weight, _, mask, ctx.arguments, random, anchor, *parts = inputs
        _save(ctx, parts, weight, anchor, mask, random)

    @staticmethod
    @none_for_none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """grad_output: (L, N, E)."""
        weight, anchor, *saved = ctx.saved_tensors
        length, samples, _ = grad_output.shape
        heads = ctx.layouts[0].shape[1]
        grad_context = (grad_output @ weight).view(length, samples, heads, -1).permute(1, 2, 0, 3)
        of_mask = ctx.needs_input_grad[5]
        context, *grads, grad_mask = _attend_again(ctx, *saved, grad_context=grad_context, of_mask=of_mask)
        grad_weight = grad_bias = None
        rows = as_rows(grad_output)
        if ctx.needs_input_grad[3]:
            grad_weight = rows.t() @ as_rows(_side_by_side(context))
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(dim=0)
        once = [None if grad is None else first_order_only(grad, anchor) for grad in (*grads, grad_weight, grad_mask)]
        return *once[:4], grad_bias, once[4], *[None] * 15


def _save(ctx: Any, parts: list[Any], *others: Tensor | None) -> None:
    ctx.layouts = parts[3::4]
    ctx.save_for_backward(*others, *(part for part in parts if not isinstance(part, Layout)))


def _attend_again(
    ctx: Any, mask: Tensor | None, random: Tensor | None, *tensors: Tensor | None, grad_context: Tensor, of_mask: bool
) -> tuple[Any, ...]:
    """The context, and the gradients of q, k, v and, if it is wanted, the mask, from what :func:`_save` saved."""
    packed = zip(tensors[::3], tensors[1::3], tensors[2::3], ctx.layouts, strict=True)
    q, k, v = (ops.unpack(Packed(*each)) for each in packed)  # type: ignore[arg-type]
    # PyTorch's own kernel is the faster one, but cannot be differentiated within a graph that is being traced, and
    # draws dropout's mask from the generator that everybody uses.
    if is_traced() or (random is not None and not q.is_cuda):
        found = _attend_by_formula(q, k, v, mask, ctx.arguments, random, grad_context)
        return *found[:4], found[4] if of_mask else None
    return _attend_by_kernel(q, k, v, mask, ctx.arguments, random, grad_context, of_mask)


def _side_by_side(context: Tensor) -> Tensor:
    """(N, heads, L, head_dim) -> (L, N, E)."""
    return context.permute(2, 0, 1, 3).reshape(context.shape[2], context.shape[0], -1)


def can_quantize(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, arguments: AttentionArguments) -> bool:
    """Whether attention can be told to keep q, k and v in few bits: wherever it could be run again in backward."""
    if is_mapped(q) or arguments.dropout >= 1:
        return False
    if arguments.dropout > 0 and k.shape[:-2] != v.shape[:-2]:
        return False  # which PyTorch takes where groups of queries share keys
    if arguments.dropout > 0 and q.is_cuda and is_traced():
        return (
            False  # a graph draws no random numbers twice; with a mask that is kept it would not use PyTorch's kernel
        )
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def dropit_scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, arguments: AttentionArguments, saver: Saver
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention``; save q, k and v, (N, heads, L, head_dim), in ``saver.bits`` bits."""
    q, k, v = autocast(q, k, v)
    return apply(DropITScaledDotProductFunction, q, k, v, mask, arguments, *_saved(q, k, v, arguments, saver))  # type: ignore[no-any-return]


def dropit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    arguments: AttentionArguments,
    saver: Saver,
) -> Tensor:
    """The same, projected: (L, N, E)."""
    q, k, v, w, b = autocast(q, k, v, weight, bias)
    return apply(DropITAttentionFunction, q, k, v, w, b, mask, arguments, *_saved(q, k, v, arguments, saver))  # type: ignore[no-any-return]


def _saved(q: Tensor, k: Tensor, v: Tensor, arguments: AttentionArguments, saver: Saver) -> tuple[Any, ...]:
    """The state of the random numbers, if any are drawn, an anchor, and the parts of the packed tensors."""
    random = None
    if arguments.dropout > 0:
        random = _drawn_mask(q, k, arguments) if torch.compiler.is_compiling() else _random_state(q.device)
    packed = (saver.quantize(x, role) for x, role in ((q, "query"), (k, "key"), (v, "value")))
    return random, anchor(q, k, v), *(part for each in packed for part in each)


def _attend_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    arguments: AttentionArguments,
    random: Tensor | None,
    grad_context: Tensor,
    of_mask: bool,
) -> tuple[Any, ...]:
    devices = [q.device.index] if q.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices, enabled=random is not None):
        if random is not None:
            _set_random_state(random, q.device)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        inputs: tuple[Tensor, ...] = (q, k, v)
        if mask is not None and of_mask:
            mask = mask.detach().requires_grad_()
            inputs = (*inputs, mask)
        context = arguments.attend(q, k, v, mask)
        grads = torch.autograd.grad(context, inputs, grad_context)
        return context.detach(), *grads, *[None] * (4 - len(grads))


def _attend_by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    arguments: AttentionArguments,
    random: Tensor | None,
    grad_context: Tensor,
) -> tuple[Any, ...]:
    """The same, with the weights (N, heads, L, S) in memory for a while."""
    groups = q.shape[-3] // k.shape[-3] if arguments.enable_gqa else 1
    k, v = _repeated(k, groups), _repeated(v, groups)
    scale = _scale(q, arguments)
    weights = _softmax(_scores(q, k, mask, arguments))
    kept = None if random is None else _dropout_mask(weights, arguments.dropout, random)
    dropped = weights if kept is None else weights * kept
    grad_weights = grad_context @ v.transpose(-2, -1)
    if kept is not None:
        grad_weights = grad_weights * kept
    grad_masked = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
    grad_mask = None if mask is None or mask.dtype is torch.bool else grad_masked.sum_to_size(mask.shape).to(mask.dtype)
    grad_scores = grad_masked * scale
    grad_k, grad_v = grad_scores.transpose(-2, -1) @ q, dropped.transpose(-2, -1) @ grad_context
    return dropped @ v, grad_scores @ k, _sum_groups(grad_k, groups), _sum_groups(grad_v, groups), grad_mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, arguments: AttentionArguments, random: Tensor | None
) -> Tensor:
    """Compute attention; in a graph that is compiled, with the dropout that ``random`` says."""
    if random is None or not torch.compiler.is_compiling():
        return arguments.attend(q, k, v, mask)
    groups = q.shape[-3] // k.shape[-3] if arguments.enable_gqa else 1
    weights = _softmax(_scores(q, _repeated(k, groups), mask, arguments))
    return weights * _dropout_mask(weights, arguments.dropout, random) @ _repeated(v, groups)


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=-3) if groups > 1 else x


def _scale(q: Tensor, arguments: AttentionArguments) -> float:
    return 1 / math.sqrt(q.shape[-1]) if arguments.scale is None else arguments.scale


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, arguments: AttentionArguments) -> Tensor:
    """(N, heads, L, S)."""
    scores = q @ k.transpose(-2, -1) * _scale(q, arguments)
    if arguments.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is None:
        return scores
    # Under autocast the forward pass has cast the mask.
    return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(scores.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """As PyTorch's attention has it: a row that a mask hides whole has weights of zero."""
    hidden = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(hidden, 0.0).softmax(dim=-1).masked_fill(hidden, 0.0)


def _dropout_mask(weights: Tensor, p: float, state: Tensor) -> Tensor:
    """What the forward pass multiplied the weights by: 0 or 1 / (1 - p)."""
    if torch.compiler.is_compiling():
        return ops.unpack_bits(state, weights.numel()).view(weights.shape).to(weights.dtype) / (1 - p)
    generator = torch.Generator()
    generator.set_state(state)
    noise = torch.empty(weights.shape, dtype=torch.promote_types(weights.dtype, torch.float32))
    return noise.bernoulli_(1 - p, generator=generator).div_(1 - p).to(weights.dtype)


def _drawn_mask(q: Tensor, k: Tensor, arguments: AttentionArguments) -> Tensor:
    """Return the bits of what dropout keeps, drawn as PyTorch does."""
    with torch.no_grad():
        whole = q.new_ones(()).expand(*q.shape[:-1], k.shape[-2]).contiguous()
        return saved_as_is(ops.pack_bits(torch.native_dropout(whole, arguments.dropout, True)[1].view(-1)))


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    """(..., heads, S, n) -> (..., heads / groups, S, n)."""
    return grad if groups == 1 else grad.unflatten(-3, (-1, groups)).sum(dim=-3)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@stands_in_for("scaled_dot_product_attention")
def _called(call: Call, *args: Any, **kwargs: Any) -> Any:
    q, k, v, mask, arguments = _arguments(*args, **kwargs)
    if not can_quantize(q, k, v, mask, arguments):
        return NotImplemented
    return dropit_scaled_dot_product(q, k, v, mask, arguments, call.saver)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, AttentionArguments]:
    return query, key, value, attn_mask, AttentionArguments(dropout_p, is_causal, scale, enable_gqa)
