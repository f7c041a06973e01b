"""nn.MultiheadAttention whose projections pack their inputs for the backward pass, and whose q, k, v may be quantized.

It is one layer: it reads ``in_proj_weight`` and ``out_proj.weight`` itself and calls no inner module, so swapping its
``out_proj`` alone would do nothing. The steps and their order are PyTorch's, so that gamma 0 is ordinary training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dropit.layers.layer import DropITLayer
from dropit.layers.linear import as_rows, dropit_linear
from dropit.layers.scaled_dot_product import AttentionArguments, can_quantize, dropit_attention
from dropit.layers.table import register


@register
class DropITMultiheadAttention(DropITLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with packed inputs of its projections, and quantized queries, keys and values."""

    plain = nn.MultiheadAttention
    drops_input = True
    quantizes = True  # its queries, keys and values

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (L, N, E) or, with batch_first, (N, L, E), or unbatched (L, E)."""
        if not self._has_gradients(query, key, value) or not self._fits(query, key, value, key_padding_mask, attn_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = self._projected(*self._length_first(query, key, value, batched), together=batched)  # each (L, N, E)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        # Without another mask and without weights, attention's kernel makes the causal mask itself.
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else _merged_mask(attn_mask, key_padding_mask, q, self.num_heads)
        k, v, mask = self._extended(k, v, mask)

        length, samples, _ = q.shape
        q, k, v = (self._heads(x) for x in (q, k, v))  # (N, heads, L, head_dim)
        weights_out = None
        arguments = AttentionArguments(self.dropout, hint)
        weight, bias = self.out_proj.weight, self.out_proj.bias
        if self._dropit_saver.bits is not None and not need_weights and can_quantize(q, k, v, mask, arguments):
            output = dropit_attention(q, k, v, weight, bias, mask, arguments, self._dropit_saver)
        else:
            attend = self._attend_with_weights if need_weights else self._attend
            context, weights_out, is_saved = attend(q, k, v, mask, hint)
            output = self._project(context.reshape(length, samples, self.embed_dim), weight, bias, is_saved)
        if weights_out is not None and average_attn_weights:
            weights_out = weights_out.mean(dim=1)
        if not batched:
            return output.squeeze(1), None if weights_out is None else weights_out.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights_out

    def _has_gradients(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        if not self.dropit_is_active(query=query, key=key, value=value) or is_parametrized(self):
            return False
        if not query.is_floating_point() or query.numel() == 0:
            return False
        if is_parametrized(self.out_proj):  # its weight is computed each time it is read
            return True
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return any(weight is not None and weight.requires_grad for weight in (*weights, self.out_proj.weight))

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether these are of shapes and dtypes that PyTorch takes; it has an error for others."""
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or key.shape[:-1] != value.shape[:-1]:
            return False
        if [x.shape[-1] for x in (query, key, value)] != [self.embed_dim, self.kdim, self.vdim]:
            return False
        length_at = 1 if dims == 3 and self.batch_first else 0
        samples = [query.shape[1 - length_at], key.shape[1 - length_at]] if dims == 3 else [1, 1]
        length, others = query.shape[length_at], key.shape[length_at]
        padded = (samples[0], others) if dims == 3 else (others,)
        masks = ((length, others), (samples[0] * self.num_heads, length, others))
        return (
            samples[0] == samples[1]
            and (padding is None or (tuple(padding.shape) == padded and _is_mask(padding)))
            and (attn_mask is None or (tuple(attn_mask.shape) in masks and _is_mask(attn_mask)))
        )

    def _project(self, context: Tensor, weight: Tensor, bias: Tensor | None, is_saved: bool) -> Tensor:
        """Attention's output (L, N, E), by rows, as PyTorch has it."""
        if is_saved:  # by attention itself: a packed copy on top would free nothing
            rows = F.linear(as_rows(context), weight, bias)
        else:
            rows = dropit_linear(context, weight, bias, self._dropit_saver, batch_dim=1, role="context", flat=True)
        return rows.view(*context.shape[:-1], rows.shape[-1])

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None, role: str) -> Tensor:
        return dropit_linear(input, weight, bias, self._dropit_saver, batch_dim=1, role=role)

    def _length_first(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(L, N, E) each; what is one tensor stays one, so that it is projected, and packed, once."""
        # Compared by ``is`` alone: by its ``id`` a compiler takes a tensor for a constant, and recompiles in each step.
        q = self._laid(query, batched)
        k = q if key is query else self._laid(key, batched)
        if value is query:
            return q, k, q
        return q, k, k if value is key else self._laid(value, batched)

    def _laid(self, x: Tensor, batched: bool) -> Tensor:
        """(L, N, E)."""
        if batched and not self.batch_first:
            return x
        return self._dropit_memo.viewed(x, _length_first if batched else _as_batch)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, together: bool) -> tuple[Tensor, ...]:
        """``together``: whether what is read by several is projected at once, as PyTorch does if there is a batch."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        together = together and self._qkv_same_embed_dim
        if together and query is key and key is value:
            return _split_projections(self._linear(query, weight, bias, "query"), 3)  # type: ignore[arg-type]
        if together and key is value:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            of_query, of_both = weight.split(sizes)  # type: ignore[union-attr]
            bias_query, bias_both = (None, None) if bias is None else bias.split(sizes)
            both = _split_projections(self._linear(key, of_both, bias_both, "key"), 2)
            return self._linear(query, of_query, bias_query, "query"), *both
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(self._linear, (query, key, value), weights, biases, ("query", "key", "value")))  # type: ignore[arg-type]

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that bias_k, bias_v and add_zero_attn put at the end, which no mask hides."""
        samples = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, samples, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, samples, 1)])
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            zeros = k.new_zeros(1, samples, self.embed_dim)
            k, v = torch.cat([k, zeros]), torch.cat([v, zeros])
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _heads(self, x: Tensor) -> Tensor:
        """(L, N, E) -> (N, heads, L, head_dim)."""
        length, samples, _ = x.shape
        flat = x.view(length, samples * self.num_heads, self.head_dim).transpose(0, 1)
        return flat.view(samples, self.num_heads, length, self.head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, hint: bool) -> tuple[Tensor, None, bool]:
        """The context (L, N, heads, head_dim), and whether attention's own saved output is that very tensor."""
        output = F.scaled_dot_product_attention(q, k, v, mask, self.dropout, hint)
        context = output.permute(2, 0, 1, 3)
        return context, None, context.is_contiguous()

    def _attend_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, hint: bool
    ) -> tuple[Tensor, Tensor, bool]:
        """The context, and the weights (N, heads, L, S)."""
        samples, heads, length, _ = q.shape
        q, k, v = (x.reshape(samples * heads, -1, self.head_dim) for x in (q, k, v))
        q = q * math.sqrt(1.0 / self.head_dim)
        if mask is None:
            scores = torch.bmm(q, k.transpose(-2, -1))
        else:
            mask = mask.expand(samples, heads, length, k.shape[1]).reshape(samples * heads, length, -1)
            scores = torch.baddbmm(mask, q, k.transpose(-2, -1))
        weights = F.dropout(F.softmax(scores, dim=-1), self.dropout) if self.dropout > 0 else F.softmax(scores, dim=-1)
        context = torch.bmm(weights, v).transpose(0, 1)  # (L, N heads, head_dim)
        return context, weights.view(samples, heads, length, -1), False


def _length_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _as_batch(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


def _split_projections(projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(L, N, parts E) -> parts tensors (L, N, E), each contiguous."""
    stacked = projected.unflatten(-1, (parts, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return tuple(stacked.unbind(0))


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """Both masks as one to be added to the scores: it broadcasts to (N, heads, L, S)."""
    merged = None if attn_mask is None else _additive(attn_mask, like.dtype)
    if merged is not None:
        merged = merged.view(-1, heads, *merged.shape[1:]) if merged.dim() == 3 else merged[None, None]
    if padding is not None:
        hidden = _additive(padding, like.dtype)[:, None, None]
        merged = hidden if merged is None else merged + hidden
    return merged


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype is torch.bool or mask.is_floating_point()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
