"""Share what is saved for backward between the layers of a model, so that nothing is saved twice.

A normalization that saves its normalized input x-hat in 8 bits can compute its output from them, as
x-hat * weight + bias. A convolution that reads this output then saves nothing of it, and drops nothing from it: it
restores the output from what the normalization saved. So does one behind a ReLU, which applies the ReLU once more.
And an input that several layers read, as queries, keys and values do, is packed once for all of them.

The rules:

- Who publishes: a layer whose output follows from what it saves (normalization, smooth activations), and one whose
  output follows from an input that was published (ReLU, max-pooling).
- Who may read: any layer of the model that ``to_dropit`` was called for, converted in this call or before, that is
  given the published tensor itself, or a view that has the same elements.
- What ends it: a change of the tensor, noticed by its version and, on a CPU, by a digest of its elements
  (:class:`dropit.snapshot.Snapshot`). What was packed of an input is given once to each reader, so that a tensor that
  lives on, as a buffer refilled for each batch, is packed again in the next pass.
- Another scope: activation checkpointing runs a region twice, and what was saved outside of it is out of reach there.
  A reader then saves the tensor again, in as many bits as the publishing layer, and still drops nothing.
- torch.compile: what is published within a graph may be read within it (:mod:`dropit.traced`). Inputs need not be
  shared, as a compiler merges equal computations by itself.
- torch.func: nothing is published or shared while it traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dropit import traced
from dropit.packed import Layout, Packed, index_in, is_dense_in_memory, layout_of, unflatten
from dropit.saved import Saved
from dropit.snapshot import Snapshot
from dropit.tracing import is_compiled, is_traced


class Published(NamedTuple):
    """What was published for a tensor. ``saved`` is None where it is out of reach, and has to be saved again."""

    saved: Saved | None
    bits: int  # in which the publishing layer saves

    def map(
        self,
        name: str,
        function: Callable[..., Tensor],
        *tensors: Tensor | None,
        in_place: Callable[..., Tensor] | None = None,
    ) -> Published:
        """Return what is published for ``function`` of the tensor: :meth:`dropit.saved.Saved.map`."""
        if self.saved is None:
            return self
        return self._replace(saved=self.saved.map(name, function, *tensors, in_place=in_place))

    def clamp(self, name: str, lower: float, upper: float) -> Published:
        """Return what is published for the tensor between the bounds: :meth:`dropit.saved.Saved.clamp`."""
        return self if self.saved is None else self._replace(saved=self.saved.clamp(name, lower, upper))

    def cast(self, dtype: torch.dtype) -> Published:
        """Return what is published for the tensor in ``dtype``: :meth:`dropit.saved.Saved.cast`."""
        return self if self.saved is None else self._replace(saved=self.saved.cast(dtype))

    def out_of_reach(self) -> Published:
        """Return the same without what is saved."""
        return self._replace(saved=None)


class _Publication(NamedTuple):
    published: Published
    snapshot: Snapshot  # of the tensor that it is for
    versions: tuple[int, ...]  # of the saved tensors

    def now(self) -> Published:
        """Return what was published, without what is saved where that has changed or is out of reach."""
        reachable = self.versions == _versions(self.published.saved) and self.snapshot.scope.is_current()
        return self.published if reachable else self.published.out_of_reach()

    def of_part(self, x: Tensor, source: Tensor) -> Published | None:
        """Return what is published for ``x``, a part of the tensor: where that is computed point by point.

        On a CPU it is computed here and compared, in place of the digest, which is of the whole.
        """
        saved = self.published.saved
        if saved is None or not saved.recipe.pointwise or self.snapshot.version != source._version:
            return None
        index, published = index_in(source, x), self.now()
        if index is None or published.saved is None:
            return None if index is None else published
        saved = saved.part(index)
        # Hidden from autocast, and from dispatch modes that count operations.
        with torch.no_grad(), torch._C._DisableAutocast(), torch._C._DisableTorchDispatch():
            if x.device.type == "cpu" and type(x) is Tensor and not torch.equal(saved.restore(), x.detach()):
                return None
        return published._replace(saved=saved)


class _SharedInput(NamedTuple):
    packed: Packed
    key: tuple[Any, ...]  # all that decides what is packed
    snapshot: Snapshot  # of the input
    readers: set[tuple[str, str]]  # which have it: layer and role


class Memo:
    """What the layers of a model publish of their outputs and have packed of their inputs, until these die."""

    def __init__(self) -> None:
        self._publications: Any = WeakTensorKeyDictionary()
        self._inputs: Any = WeakTensorKeyDictionary()
        self.callers = 0  # modules that run now whose own calls of functions are taken

    def publish(self, x: Tensor, published: Published | None) -> Tensor:
        """Let the layers that read ``x`` restore it from what another layer saves. Returns ``x``.

        Where ``published.saved`` is None they learn only that they must not drop from it: nothing is saved within the
        first run of a checkpointed region.
        """
        if published is None:
            return x
        if is_compiled():
            tensors = () if published.saved is None else published.saved.tensors
            return traced.attach(x, (self, published), *tensors)
        if not is_traced() and not x.is_inference():
            self._publications[x] = _Publication(published, Snapshot.of(x), _versions(published.saved))
        return x

    def published(self, x: Tensor) -> Published | None:
        """Return what was published for ``x`` or for the tensor that it is a view of, if that has not changed since."""
        if is_compiled():
            memo, noted = traced.attached(x) or (None, None)
            return noted if memo is self else None  # type: ignore[no-any-return]
        if is_traced() or x.is_inference():
            return None
        base = x if x._base is None else x._base
        for source in (x, base):
            found: _Publication | None = self._publications.get(source)
            if found is None:
                continue
            if x.numel() < source.numel():
                return found.of_part(x, source)
            if not found.snapshot.matches(source):
                continue
            published = found.now()
            if source is x:  # which may be in another dtype than what weights in float32 make of a restored tensor
                return published.cast(x.dtype)
            if x.numel() == source.numel() and is_dense_in_memory(x) and is_dense_in_memory(source):
                return published.map("view", partial(_viewed, layout_of(source), layout_of(x)))
        return None

    def viewed(self, x: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``view(x)``, published as ``x`` is where a compiler does not tell what it is a view of."""
        published = self.published(x) if is_compiled() else None
        return self.publish(view(x), published and published.map("view", view))

    def packed(self, source: Tensor, key: tuple[Any, ...], reader: tuple[str, str]) -> Packed | None:
        """Return what was packed of ``source`` for another reader, if it has not changed since."""
        if not _can_share(source):
            return None
        entry: _SharedInput | None = self._inputs.get(source)
        if entry is None or entry.key != key or reader in entry.readers:
            return None
        if not entry.snapshot.scope.is_current() or not entry.snapshot.matches(source):
            return None
        entry.readers.add(reader)
        return entry.packed

    def share(self, source: Tensor, key: tuple[Any, ...], reader: tuple[str, str], packed: Packed) -> None:
        """Keep what ``reader`` packed of ``source`` for other readers."""
        if _can_share(source) and not packed.is_dense:
            self._inputs[source] = _SharedInput(packed, key, Snapshot.of(source), {reader})

    @contextmanager
    def takes_calls(self) -> Iterator[None]:
        """Count one more caller while this is entered."""
        self.callers += 1
        try:
            yield
        finally:
            self.callers -= 1

    def __deepcopy__(self, _: Any) -> Memo:
        return self  # layers that are copied one by one still share

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, ()  # what is pickled is of another process


def _can_share(source: Tensor) -> bool:
    # A compiler merges equal computations by itself, and a parameter may not be known by a weak reference.
    return not (is_traced() or source.is_inference() or isinstance(source, nn.Parameter))


def _versions(saved: Saved | None) -> tuple[int, ...]:
    if saved is None:
        return ()
    return tuple(-1 if x is None or x.is_inference() else x._version for x in saved.tensors)


def _viewed(source: Layout, layout: Layout, dense: Tensor) -> Tensor:
    """The same elements, in the same order in memory, under another shape."""
    return unflatten(dense.permute(source.order).reshape(-1).to(layout.dtype), layout)
