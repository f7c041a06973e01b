"""CacheMeter: which modules and operators save how many bytes for backward; and estimate_cache."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

from dropit import ledger
from dropit.ledger import Row, SavedStorage, as_text, group, largest, print_rich, rows_by

OUTSIDE = "(outside the model)"
_ROWS = 6  # of a table by module, at least
_LINES = 8  # of one by line of code, at most
_OURS = "DropIT"  # begins the name of an operator of ours
_LIBRARIES = tuple(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (torch, ledger))


class CacheMeter:
    """Count the bytes saved for backward by what runs inside the block: every storage once, parameters and buffers not.

    It counts what autograd has saved at the end of the block, or, where a backward pass runs inside it, at that pass's
    start. A tensor that was saved but whose graph is gone by then does not count, so the output has to be kept; a view
    counts as the storage that it keeps alive. Module names come from the calls of ``model``'s modules, operator names
    from the autograd graph behind ``model``'s output.

    Args:
        model: The model that runs, all or part of it.
        retain: Whether the saved tensors are kept. False measures a forward pass that would not fit into memory, after
            which there is no backward pass.

    Attributes:
        total_bytes: Bytes saved for backward.

    Raises:
        RuntimeError: In a backward pass, if ``retain`` is False.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> with CacheMeter(model) as meter:
        ...     loss = model(torch.randn(16, 64)).sum()
        >>> meter.total_bytes, meter.by_operator()
        (8192, {'Addmm': 4096, 'Relu': 4096})
    """

    def __init__(self, model: nn.Module, *, retain: bool = True) -> None:
        self._model = model
        self._retain = retain
        self._saved: list[weakref.ref[_Saved]] = []
        self._running: list[str] = []  # the names of the modules that are running, innermost last
        self._inputs: dict[str, list[StorageWeakRef]] = defaultdict(list)  # what each module that ran was given
        self._operators: dict[int, str] = {}  # sequence number of a graph node -> its name
        self._entries: list[SavedStorage] | None = None
        self._by_storage: dict[int, SavedStorage] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> CacheMeter:
        self._saved.clear()
        self._inputs.clear()
        self._entries = self._by_storage = None
        for fqn, module in self._model.named_modules():
            self._watch(fqn, module)
        self._stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._running.clear()
        self._take_snapshot()

    @property
    def total_bytes(self) -> int:
        """Bytes saved for backward."""
        return sum(entry.nbytes for entry in self._storages())

    def by_module(self) -> dict[str, int]:
        """Bytes by the innermost module that ran when they were first saved. Sums to ``total_bytes``."""
        return _sizes(rows_by(lambda saved: saved.modules[0], self._storages()))

    def by_operator(self) -> dict[str, int]:
        """Bytes by who saves them; "Convolution + Relu" are tensors that both save. Sums to ``total_bytes``."""
        return _sizes(rows_by(lambda saved: saved.operator, self._storages()))

    def by_line(self) -> dict[str, int]:
        """Bytes by operator and line of code, of what is saved as PyTorch saves it ("Mul at model.py:12")."""
        return _sizes(self._kept_by_pytorch())

    def has_run(self, fqn: str) -> bool:
        """Whether the module was called."""
        return fqn in self._inputs

    def ran(self) -> list[str]:
        """Names of the modules that were called, in the order of their first calls."""
        return list(self._inputs)

    def saved_elsewhere(self, fqn: str) -> dict[str, int]:
        """Bytes of the module's inputs that others save and it does not, by operator and module ("Relu in layer1")."""
        inputs = dict.fromkeys(storage.cdata for storage in self._inputs.get(fqn, ()))
        storages = self._storages()
        if self._by_storage is None:
            self._by_storage = {saved.storage: saved for saved in storages}
        found = (self._by_storage[storage] for storage in inputs if storage in self._by_storage)
        elsewhere = [saved for saved in found if fqn not in saved.modules]
        return _sizes(rows_by(lambda saved: f"{saved.operator} in {saved.modules[0] or 'the model'}", elsewhere))

    def sharing(self) -> list[tuple[str, ...]]:
        """Return the names of modules that save one storage together, for each such storage."""
        together = (tuple(dict.fromkeys(saved.modules)) for saved in self._storages())
        return [names for names in together if len(names) > 1]

    def table(self, plain: CacheMeter | None = None, *, depth: int | None = None) -> str:
        """By operator, by module, and what is saved as PyTorch saves it by line of code.

        ``plain``: another meter, of the plain model; the first two tables say what that one saves, too.
        ``depth``: parts of a module's name that are told apart; None takes as many as give a table of some length.
        """
        return "\n\n".join(as_text(title, rows) for title, rows in self._tables(plain, depth))

    def to_json(self) -> str:
        """All that is known: each storage with its bytes, and the modules, operators and line of code that save it."""
        storages = [
            {
                "bytes": saved.nbytes,
                "dtype": saved.dtype,
                "modules": saved.modules,
                "operators": saved.operators,
                "line": saved.line,
            }
            for saved in self._storages()
        ]
        sums = {"by_operator": self.by_operator(), "by_module": self.by_module(), "by_line": self.by_line()}
        return json.dumps({"total_bytes": self.total_bytes, **sums, "storages": storages})

    def __str__(self) -> str:
        return self.table()

    def show(self, plain: CacheMeter | None = None, *, depth: int | None = None) -> None:
        """Print :meth:`table`, on a terminal by rich where that is installed."""
        if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
            print(self.table(plain, depth=depth))
            return
        for title, rows in self._tables(plain, depth):
            print_rich(title, rows)

    def _tables(self, plain: CacheMeter | None, depth: int | None) -> list[tuple[str, list[Row]]]:
        others = None if plain is None else plain._storages()
        lines = self._kept_by_pytorch()
        if depth is None:
            names = {saved.modules[0] for saved in self._storages()}
            deepest = max((name.count(".") + 1 for name in names), default=1)
            enough = (d for d in range(1, deepest) if len({group(name, d) for name in names}) >= _ROWS)
            depth = next(enough, deepest)
        return [
            ("saved for backward, by operator", rows_by(lambda saved: saved.operator, self._storages(), others)),
            ("by module", rows_by(lambda saved: group(saved.modules[0], depth), self._storages(), others)),
            *([("as PyTorch saves it, by line of code", largest(lines, _LINES))] if lines else []),
        ]

    def _kept_by_pytorch(self) -> list[Row]:
        kept = [saved for saved in self._storages() if not any(name.startswith(_OURS) for name in saved.operators)]
        return rows_by(lambda saved: f"{saved.operator} at {saved.line}", kept)

    def _storages(self) -> list[SavedStorage]:
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
        saved = _Saved(tensor, self._retain, module, node, _calling_line())
        self._saved.append(weakref.ref(saved))
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        self._take_snapshot()
        if saved.tensor is None:
            raise RuntimeError("this forward pass was measured with retain=False: there is no backward")
        return saved.tensor

    def _take_snapshot(self) -> None:
        if self._entries is not None:
            return
        own = {t.untyped_storage()._cdata for t in (*self._model.parameters(), *self._model.buffers())}
        groups: dict[int, list[_Saved]] = defaultdict(list)
        for reference in self._saved:
            saved = reference()
            if saved is not None and saved.storage.cdata not in own:
                groups[saved.storage.cdata].append(saved)
        self._entries = [self._entry(group) for group in groups.values()]

    def _entry(self, group: list[_Saved]) -> SavedStorage:
        first = group[0]
        modules = tuple(saved.module for saved in group)
        return SavedStorage(
            first.storage.cdata,
            first.bytes_now(),
            first.dtype,
            modules,
            tuple(map(self._operator_of, group)),
            "" if first.line is None else f"{first.line[0].rpartition(os.sep)[2]}:{first.line[1]}",
        )

    def _operator_of(self, saved: _Saved) -> str:
        if saved.module == OUTSIDE:
            return self._operators.get(saved.node, OUTSIDE)
        # An operation in place saves a copy of what it overwrites, and the copy takes the number after its own.
        return self._operators.get(saved.node) or self._operators.get(saved.node - 1, OUTSIDE)


class _Saved:
    """What the graph has in place of a saved tensor; it dies with its node."""

    __slots__ = ("__weakref__", "dtype", "line", "module", "nbytes", "node", "storage", "tensor")

    def __init__(self, tensor: Tensor, retain: bool, module: str, node: int, line: tuple[str, int] | None) -> None:
        self.tensor = tensor if retain else None
        self.storage = StorageWeakRef(tensor.untyped_storage())  # keeps the storage's identity, not its bytes
        self.nbytes = tensor.untyped_storage().nbytes()
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.module = module
        self.node = node
        self.line = line

    def bytes_now(self) -> int:
        """Of the storage as it is now: FSDP frees weights that it will gather again."""
        return self.nbytes if self.tensor is None else self.tensor.untyped_storage().nbytes()


def _calling_line() -> tuple[str, int] | None:
    """Return the file and the number of the innermost line that runs and is neither PyTorch's nor ours."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


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


def _sizes(rows: list[Row]) -> dict[str, int]:
    return {row.name: row.nbytes for row in rows}


def estimate_cache(
    model: nn.Module | Callable[[], nn.Module],
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    loss_fn: Callable[[Any], Any] | None = None,
) -> CacheMeter:
    """Return what :class:`CacheMeter` would measure in a forward pass of ``model``, without its memory or its time.

    Attention is taken to run in one kernel, as it does on CPUs and on GPUs without dropout.

    Args:
        model: A module, which stays as it is, or a function that builds one; both run on the meta device, in training
            mode.
        input_shape: Of the one input; its first dimension is the batch.
        dtype: Of the input.
        loss_fn: What is computed of the output and counts as well.

    Returns:
        A meter, with the bytes by module and by operator.

    Raises:
        RuntimeError: If the model reads values, which tensors on the meta device do not have.

    Example:
        >>> estimate_cache(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (1024, 64)).total_bytes
        524288
    """
    with torch.device("meta"):
        built = _on_meta(model) if isinstance(model, nn.Module) else model()
        x = torch.empty(tuple(input_shape), dtype=dtype)
    built.train()
    with _fused_attention(), CacheMeter(built) as meter:
        output = built(x)
        if loss_fn is not None:
            output = loss_fn(output)
    del output
    return meter


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without any values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Have attention on the meta device save what a fused kernel saves, and not its weights.

    PyTorch has no fused kernel for meta tensors. The function is replaced, not intercepted by a mode, because modes
    do not see into ``F.multi_head_attention_forward``.
    """
    real = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        tensors = (query, key, value)
        if has_torch_function(tensors):
            return handle_torch_function(attention, tensors, *tensors, attn_mask, dropout_p, *rest, **named)  # type: ignore[no-any-return]
        fused = query.is_meta and dropout_p == 0 and (attn_mask is None or not attn_mask.requires_grad)
        if fused and torch.is_grad_enabled():
            return ScaledDotProductAttention.apply(query, key, value, attn_mask)[0]  # type: ignore[no-any-return]
        return real(query, key, value, attn_mask, dropout_p, *rest, **named)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class ScaledDotProductAttention(Function):
    """The shapes of fused attention: it saves q, k, v, its output, and a logarithm for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(N, heads, L, head_dim) each."""
        output = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(q, k, v, output, rows, mask)
        return output, rows
