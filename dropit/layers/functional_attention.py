"""Modules that call ``F.scaled_dot_product_attention`` by themselves, as timm's and Hugging Face's do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropit.layers.layer import DropITLayer
from dropit.layers.scaled_dot_product import AttentionArguments, can_quantize, dropit_scaled_dot_product
from dropit.layers.table import calls_registered, register_callers
from dropit.saver import Saver

_attention = F.scaled_dot_product_attention


@register_callers("scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS")
class DropITFunctionalAttention(DropITLayer, nn.Module):
    """A module whose forward calls attention as a function: its q, k and v are saved in 16 to 2 bits."""

    plain = nn.Module
    quantizes = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        if not self.dropit_is_active():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        others = [module for module in self.modules() if _is_plain(module)]
        if others and torch.compiler.is_compiling():  # which has no place for hooks
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Quantizing(self._dropit_saver) as mode:
            if not others:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            with _suspended_in(others, mode):
                return super().forward(*args, **kwargs)  # type: ignore[misc]


def _is_plain(module: nn.Module) -> bool:
    """Whether the module's own calls of attention, if it makes any, are not to be quantized: left out, or in eval."""
    if isinstance(module, DropITFunctionalAttention):
        return not module.training
    return calls_registered(type(module))


@contextmanager
def _suspended_in(modules: list[nn.Module], mode: _Quantizing) -> Iterator[None]:
    """While one of these runs, ``mode`` takes no calls."""

    def enter(*_: Any) -> None:
        mode.suspended += 1

    def leave(*_: Any) -> None:
        mode.suspended -= 1

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Quantizing(TorchFunctionMode):
    """Takes the calls of attention, and leaves all other functions alone."""

    def __init__(self, saver: Saver) -> None:
        super().__init__()
        self.suspended = 0
        self._saver = saver

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.suspended or func not in (_attention, F.scaled_dot_product_attention):  # estimate_cache has its own
            return func(*args, **named)
        q, k, v, mask, arguments = _arguments(*args, **named)
        if not can_quantize(q, k, v, mask, arguments):
            return func(*args, **named)
        if torch.compiler.is_compiling():  # which takes no tensor twice
            k, v = (x.view_as(x) for x in (k, v))
        return dropit_scaled_dot_product(q, k, v, mask, arguments, self._saver)


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
