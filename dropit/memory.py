"""CacheMeter: how many bytes a forward pass holds for the backward pass, and who holds them."""

from __future__ import annotations

import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

MIB = 2**20
OUTSIDE = "(outside the model)"


class CacheMeter:
    """Count the bytes held for backward by what runs inside the block: every storage once, parameters and buffers not.

        with CacheMeter(model) as meter:
            loss = loss_fn(model(x), y)
        meter.total_bytes

    What is counted is what autograd holds at the end of the block, or, where a backward pass runs inside it, at that
    pass's start. A tensor that was saved but whose graph is gone by then does not count; a view counts as the storage
    that it keeps alive. With ``retain=False`` nothing is kept, so a forward pass that would not fit can be measured;
    there is no backward then. Module names come from the calls of ``model``'s modules, operator names from the
    autograd graph behind ``model``'s output.
    """

    def __init__(self, model: nn.Module, *, retain: bool = True) -> None:
        self._model = model
        self._retain = retain
        self._saved: list[weakref.ref[_Saved]] = []
        self._running: list[str] = []  # the names of the modules that are running, innermost last
        self._inputs: dict[str, list[StorageWeakRef]] = defaultdict(list)  # what each module that ran was given
        self._operators: dict[int, str] = {}  # sequence number of a graph node -> its name
        self._entries: list[_Entry] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> CacheMeter:
        self._saved.clear()
        self._inputs.clear()
        self._entries = None
        for fqn, module in self._model.named_modules():
            self._watch(fqn, module)
        self._stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._running.clear()
        self._take_stock()

    @property
    def total_bytes(self) -> int:
        """Bytes held for backward."""
        return sum(entry.nbytes for entry in self._held())

    def by_module(self) -> dict[str, int]:
        """Bytes by the innermost module that ran when they were first saved. Sums to ``total_bytes``."""
        return _sum_by((entry.modules[0], entry.nbytes) for entry in self._held())

    def by_operator(self) -> dict[str, int]:
        """Bytes by who saves them; "Convolution + Relu" are tensors that both hold. Sums to ``total_bytes``."""
        return _sum_by((" + ".join(sorted(set(entry.operators))), entry.nbytes) for entry in self._held())

    def ran(self, fqn: str) -> bool:
        """Whether the module of this name was called."""
        return fqn in self._inputs

    def held_elsewhere(self, fqn: str) -> dict[str, int]:
        """Bytes of the module's own inputs that it does not hold itself, by who does ("Relu in layer1")."""
        inputs = {storage.cdata for storage in self._inputs[fqn]} if self.ran(fqn) else set()
        return _sum_by(
            (f"{operator} in {module or 'the model'}", entry.nbytes)
            for entry in self._held()
            if entry.storage in inputs and fqn not in entry.modules
            for operator, module in [(" + ".join(sorted(set(entry.operators))), entry.modules[0])]
        )

    def __str__(self) -> str:
        total = self.total_bytes
        rows = self.by_operator()
        width = max(map(len, [*rows, "held for backward"]))
        lines = [f"{'held for backward':{width}}        MiB  share"]
        lines += [f"{name:{width}} {size / MIB:10.2f} {size / total:6.1%}" for name, size in rows.items()]
        return "\n".join([*lines, f"{'total':{width}} {total / MIB:10.2f}"])

    def _held(self) -> list[_Entry]:
        if self._entries is None:
            raise RuntimeError("nothing measured yet: use CacheMeter as a context manager and read it afterwards")
        return self._entries

    def _watch(self, fqn: str, module: nn.Module) -> None:
        # A compiled model is counted whole, without names: its graph has no place for these hooks.
        def enter(module: nn.Module, args: object, kwargs: object) -> None:
            if not torch.compiler.is_compiling():
                self._running.append(fqn)
                self._inputs[fqn] += [
                    StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_read(t)
                ]

        def leave(module: nn.Module, args: object, output: object) -> None:
            if torch.compiler.is_compiling():
                return
            self._running.pop()
            if module is self._model:
                self._name_operators(output)

        self._stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._stack.enter_context(module.register_forward_hook(leave, always_call=True))

    def _name_operators(self, output: object) -> None:
        """Walk the graph behind ``output``: a saved tensor is known by its node's number when it is saved."""
        pending = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        while pending:
            node = pending.pop()
            if node is None or node._sequence_nr() in self._operators:  # type: ignore[attr-defined]
                continue
            self._operators[node._sequence_nr()] = _operator(node)  # type: ignore[attr-defined]
            pending += [following for following, _ in node.next_functions]

    def _pack(self, tensor: Tensor) -> _Saved:
        module = self._running[-1] if self._running else OUTSIDE
        # Autograd numbers a node when it makes it, just before the node saves its tensors.
        node = torch._C._autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        saved = _Saved(tensor, self._retain, module, node)
        self._saved.append(weakref.ref(saved))
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        self._take_stock()
        if saved.tensor is None:
            raise RuntimeError("this forward pass was measured with retain=False: there is no backward")
        return saved.tensor

    def _take_stock(self) -> None:
        if self._entries is not None:
            return
        own = {StorageWeakRef(t.untyped_storage()).cdata for t in (*self._model.parameters(), *self._model.buffers())}
        groups: dict[int, list[_Saved]] = defaultdict(list)
        for reference in self._saved:
            saved = reference()
            if saved is not None and saved.storage.cdata not in own:
                groups[saved.storage.cdata].append(saved)
        self._entries = [self._entry(group) for group in groups.values()]

    def _entry(self, group: list[_Saved]) -> _Entry:
        operators = [self._operator_of(saved) for saved in group]
        return _Entry(group[0].storage.cdata, group[0].nbytes, [saved.module for saved in group], operators)

    def _operator_of(self, saved: _Saved) -> str:
        if saved.module == OUTSIDE:
            return self._operators.get(saved.node, OUTSIDE)
        # An operation in place saves a copy of what it overwrites, and the copy takes the number after its own.
        return self._operators.get(saved.node) or self._operators.get(saved.node - 1, OUTSIDE)


@dataclass
class _Entry:
    """One storage that is held, and by whom."""

    storage: int
    nbytes: int
    modules: list[str]
    operators: list[str]


class _Saved:
    """What the graph holds in place of a saved tensor; it dies with its node."""

    __slots__ = ("__weakref__", "module", "nbytes", "node", "storage", "tensor")

    def __init__(self, tensor: Tensor, retain: bool, module: str, node: int) -> None:
        self.tensor = tensor if retain else None
        self.storage = StorageWeakRef(tensor.untyped_storage())  # keeps the storage's identity, not its bytes
        self.nbytes = tensor.untyped_storage().nbytes()
        self.module = module
        self.node = node


def _is_read(leaf: object) -> bool:
    """Whether a module reads this very tensor, and not what autocast makes of it."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        return False
    device = leaf.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return True
    return leaf.dtype == torch.get_autocast_dtype(device)


def _operator(node: Node) -> str:
    return re.sub(r"(Function)?Backward\d*$", "", node.name())


def _sum_by(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sum of the sizes of each name, largest first."""
    sums: Counter[str] = Counter()
    for name, nbytes in sizes:
        sums[name] += nbytes
    return dict(sums.most_common())
