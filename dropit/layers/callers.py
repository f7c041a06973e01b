"""Modules whose own code calls functions of the table: a hand-written norm, gated MLP or attention, a model's glue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dropit.layers.functions import FunctionCalls, calls_functions, taking_calls
from dropit.layers.layer import DropITLayer
from dropit.layers.table import SWAPS, register_where


@register_where(calls_functions)
class DropITCaller(DropITLayer, nn.Module):
    """A module whose forward calls functions: what they save is quantized, or a bit per element."""

    plain = nn.Module
    quantizes = True
    calls_functions = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        compiling = torch.compiler.is_compiling()  # which has no place for hooks, and keeps the modes apart by itself
        if not self.dropit_is_active():
            with nullcontext() if compiling else taking_calls(None):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        others = [module for module in self.modules() if _is_plain(module)]
        if others and compiling:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        mode = FunctionCalls(self._dropit_saver)
        if compiling:
            with mode:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        with taking_calls(mode), self._dropit_memo.takes_calls(), _suspended_in(others, mode):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _is_plain(module: nn.Module) -> bool:
    """Whether the module's own calls, if it makes any, are not to be taken: it was left out, or is in eval mode."""
    return getattr(SWAPS.get(type(module)), "calls_functions", False)


@contextmanager
def _suspended_in(modules: list[nn.Module], mode: FunctionCalls) -> Iterator[None]:
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
