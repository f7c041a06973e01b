"""DropITLayer: what the converted layers have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dropit.rematerialize import Memo
from dropit.saver import Saver
from dropit.tracing import is_mapped

Output = TypeVar("Output")


class _Shown:
    """An attribute that shows part of a layer's saver, and hides nothing that the module itself has by the same name.

    What is in the module's ``__dict__`` is found before it, as it cannot be set; what ``__getattr__`` gives, which are
    parameters, buffers and submodules, is looked up first.
    """

    def __init__(self, read: Callable[[Saver], Any]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: DropITLayer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        with suppress(AttributeError):
            return layer.__getattr__(self._name)
        return self._read(layer._dropit_saver)


class _PlainClass:
    """A layer's class attribute ``plain``, which hides no parameter, buffer or submodule by that name."""

    def __init__(self, plain: type[nn.Module]) -> None:
        self._plain = plain

    def __get__(self, layer: DropITLayer | None, owner: type | None = None) -> Any:
        if layer is not None:
            with suppress(AttributeError):
                return layer.__getattr__("plain")
        return self._plain


class DropITLayer(nn.Module):
    """Mixed into a plain layer's class. A layer is converted by giving the existing module the mixed class.

    So parameters, hooks and state_dict keys stay as they are. ``plain`` is the class that the module had.

    ``drops_input``: it has a weight, and its input is packed by the strategy, so that the weight's gradient is
    approximated; all other gradients are exact. ``quantizes``: what it saves is quantized, so that its gradients are
    approximated. A layer that does neither is lossless: it saves less than the plain layer, and has the same gradients
    bit for bit. ``calls_functions``: it is converted for the sake of functions that its own code calls, some of which
    are lossless.
    """

    plain: ClassVar[type[nn.Module]]
    drops_input: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    calls_functions: ClassVar[bool] = False
    saver = _Shown(lambda saver: saver)
    strategy = _Shown(lambda saver: saver.policy.strategy)
    _dropit_saver: Saver
    _dropit_off = False  # whether it computes as the plain layer does, where its class has to stay

    def __init_subclass__(cls, **_: Any) -> None:
        """Do not call the plain class's, which may keep a list of its subclasses."""
        if isinstance(vars(cls).get("plain"), type):
            type.__setattr__(cls, "plain", _PlainClass(cls.plain))

    @property
    def _dropit_memo(self) -> Memo:
        """What it shares with other layers; nothing, if it was not converted but made by hand."""
        saver = vars(self).get("_dropit_saver")
        return Memo() if saver is None else saver.memo

    def dropit_is_active(self, **inputs: Tensor) -> bool:
        """Whether this forward pass saves for backward as DropIT does: in training, with gradients on.

        ``inputs``: by role, those that it may save; nested tensors are left to PyTorch. Those of a pass without
        gradients are noted, since it may be the first run of a checkpointed region.
        """
        if not self.training or self._dropit_off:
            return False
        dense = {role: x for role, x in inputs.items() if not x.is_nested}
        if not torch.is_grad_enabled():
            if not is_lossless(self):
                self._dropit_saver.note_unsaved(dense)
            return False
        return len(dense) == len(inputs)

    def saves(self, input: Tensor) -> bool:
        """Whether this forward pass saves anything: where a gradient of the input, or of a weight, is wanted."""
        if not self.dropit_is_active(input=input):
            return False
        if is_lossless(self):
            return input.requires_grad
        wanted = input.requires_grad or any(p.requires_grad for p in self.parameters(recurse=False))
        return wanted and not is_mapped(input)

    def publish_unsaved(self, output: Tensor) -> Tensor:
        """Publish ``output`` without what is saved, in a pass in training without gradients. Returns it."""
        if self.training and not torch.is_grad_enabled() and not self._dropit_off:
            self._dropit_saver.publish(output, None)
        return output

    def pass_on_unsaved(self, forward: Callable[[Tensor], Output], input: Tensor) -> Output:
        """Return ``forward(input)``; in a pass in training without gradients, published if ``input`` was."""
        if not self.training or torch.is_grad_enabled() or self._dropit_off:
            return forward(input)
        memo = self._dropit_memo
        published, output = memo.published(input), forward(input)
        if published is not None and isinstance(output, Tensor):
            memo.publish(output, published.out_of_reach())
        return output

    def extra_repr(self) -> str:
        """Return the plain layer's, and the strategy or the number of bits."""
        now = ""
        if (self.drops_input or self.calls_functions) and not self._dropit_off:
            now = f"strategy={self._dropit_saver}"
        elif self.quantizes and not self._dropit_off:
            now = f"bits={self._dropit_saver.bits}"
        return ", ".join(filter(None, [super().extra_repr(), now]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the keys, where modules note their version.
        if hasattr(destination, "_metadata") and self._notes_policy():
            notes = {"dropit": repr(self._dropit_saver), "dropit_drawn": self._dropit_saver.drawn()}
            destination._metadata[prefix[:-1]].update(notes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if self._notes_policy():
            saved, now = local_metadata.get("dropit"), repr(self._dropit_saver)
            if saved is not None and saved != now:
                warnings.warn(f"this state was trained with {saved}, and goes on with {now}", stacklevel=2)
            self._dropit_saver.continue_after(*local_metadata.get("dropit_drawn", ({}, 0)))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _notes_policy(self) -> bool:
        return not is_lossless(self) and not self._dropit_off


def is_lossless(layer: DropITLayer) -> bool:
    """Whether the layer approximates no gradient."""
    return not (layer.drops_input or layer.quantizes)


def needs_bits(layer: DropITLayer | type[DropITLayer]) -> bool:
    """Whether the layer saves what the plain one does where nothing is quantized."""
    return layer.quantizes and not (layer.drops_input or layer.calls_functions)


def is_converted(module: nn.Module) -> bool:
    """Whether the module is one of DropIT's layers, and works as one."""
    return isinstance(module, DropITLayer) and not module._dropit_off
