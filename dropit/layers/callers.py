"""Modules whose own code calls functions of the table: a hand-written norm, gated MLP or attention, a model's glue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dropit.layers.functions import FunctionCalls, calls_functions, keep_from_frames, run_with
from dropit.layers.layer import DropITLayer
from dropit.layers.table import SWAPS, register_where
from dropit.saver import Saver


@register_where(calls_functions)
class DropITCaller(DropITLayer, nn.Module):
    """A module whose forward calls functions: what they save is packed, quantized, or a bit per element."""

    plain = nn.Module
    quantizes = True
    calls_functions = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's."""
        forward = super().forward
        active, compiling = self.dropit_is_active(), torch.compiler.is_compiling()
        others = [module for module in self.modules() if _is_left_out(module, self._dropit_saver)] if active else []
        if compiling:  # which has no place for hooks, and keeps the modes apart by itself
            if not active or others:
                return forward(*args, **kwargs)
            keep_from_frames()
            with FunctionCalls(self._dropit_saver):
                return forward(*args, **kwargs)
        if not active:
            return run_with(None, forward, *args, **kwargs)
        mode = FunctionCalls(self._dropit_saver)
        with self._dropit_memo.takes_calls(), _suspended_in(others, mode) if others else nullcontext():
            return run_with(mode, forward, *args, **kwargs)


def _is_left_out(module: nn.Module, saver: Saver) -> bool:
    """Whether the calls that the module's own code may make are not to be taken, as it was not converted."""
    if isinstance(module, ParametrizationList):  # it computes weights
        return True
    swap = SWAPS.get(type(module))
    return swap is not None and (swap.calls_functions or saver.bits is not None or not swap.quantizes)


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
