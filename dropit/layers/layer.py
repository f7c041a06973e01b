"""What the swapped layers have in common."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dropit import ops
from dropit.packed import flatten, is_dense_in_memory, memory_order, unflatten
from dropit.packer import Packer
from dropit.stored import offer, offered
from dropit.tracing import is_mapped, is_traced

Output = TypeVar("Output")


class _Readable:
    """An attribute that shows part of a layer's packer, and hides nothing that the module has by the same name itself.

    What is in the module's ``__dict__`` is found before it, as it cannot be set; what ``__getattr__`` gives, which are
    parameters, buffers and submodules, is asked for first.
    """

    def __init__(self, read: Callable[[Packer], Any]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: DropITLayer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        with suppress(AttributeError):
            return layer.__getattr__(self._name)
        return self._read(layer._dropit_packer)


class DropITLayer(nn.Module):
    """Mixed into a plain layer's class. A layer is swapped by giving the existing module the mixed class.

    So parameters, hooks and state_dict keys stay as they are. ``plain`` is the class it had.
    """

    plain: ClassVar[type[nn.Module]]
    _dropit_packer: Packer
    _dropit_off = False  # whether it computes as the plain layer does, where its class has to stay

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep from the plain class, which may keep a list of its subclasses, that there is one more."""

    def saves(self, **inputs: Tensor) -> bool:
        """Whether a forward pass now saves anything for backward: in training, with gradients on.

        ``inputs``: by role, those that it may store; nested ones are PyTorch's.
        """
        if not self.training or not torch.is_grad_enabled() or self._dropit_off:
            return False
        return not any(x.is_nested for x in inputs.values())


def is_converted(module: nn.Module) -> bool:
    """Whether it is one of DropIT's layers, and works as one."""
    return isinstance(module, DropITLayer) and not module._dropit_off


class _PackerLayer(DropITLayer):
    """A layer that is told by a packer how to store what it keeps."""

    packer = _Readable(lambda packer: packer)

    def saves(self, **inputs: Tensor) -> bool:
        """The same; what a pass without gradients reads is noted, since it may be a checkpointed region's first run."""
        if self.training and not torch.is_grad_enabled() and not self._dropit_off:
            self._dropit_packer.skip({role: x for role, x in inputs.items() if not x.is_nested})
        return super().saves(**inputs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the keys, where modules note their version.
        if hasattr(destination, "_metadata") and not self._dropit_off:
            notes = {"dropit": repr(self._dropit_packer), "dropit_drawn": self._dropit_packer.drawn()}
            destination._metadata[prefix[:-1]].update(notes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if not self._dropit_off:
            saved, now = local_metadata.get("dropit"), repr(self._dropit_packer)
            if saved is not None and saved != now:
                warnings.warn(f"this state was trained with {saved}, and goes on with {now}", stacklevel=2)
            self._dropit_packer.draw_on(*local_metadata.get("dropit_drawn", ({}, 0)))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class PackedInputLayer(_PackerLayer):
    """A layer with a weight, whose input is packed by ``strategy``: grad_weight is approximated, the rest exact."""

    strategy = _Readable(lambda packer: packer.strategy)

    def packs(self, weight: Tensor) -> bool:
        """Whether a forward pass now packs its input: in training, where a gradient of the weight is wanted."""
        return self.saves() and weight.requires_grad

    def extra_repr(self) -> str:
        """The plain layer's, and the strategy."""
        now = "" if self._dropit_off else f"strategy={self._dropit_packer}"
        return ", ".join(filter(None, [super().extra_repr(), now]))


class QuantizedLayer(_PackerLayer):
    """A layer that drops nothing, and keeps what it keeps in fewer bits: its own gradients are approximated."""

    def packs(self, input: Tensor) -> bool:
        """Whether a forward pass now keeps anything: in training, where a gradient is wanted, but not under vmap."""
        if not self.saves(input=input):
            return False
        wanted = input.requires_grad or any(p.requires_grad for p in self.parameters(recurse=False))
        return wanted and not is_mapped(input)

    def passes_on(self, output: Tensor) -> Tensor:
        """``output``, on offer as it would be if gradients were on, where they are off in training."""
        if self.training and not torch.is_grad_enabled() and not self._dropit_off:
            offer(output, self._dropit_packer.offer(None))
        return output

    def extra_repr(self) -> str:
        """The plain layer's, and the number of bits."""
        now = "" if self._dropit_off else f"bits={self._dropit_packer.bits}"
        return ", ".join(filter(None, [super().extra_repr(), now]))


class LosslessLayer(DropITLayer):
    """A layer without a weight that keeps less than PyTorch does, and has the same gradients bit for bit."""

    def packs(self, input: Tensor) -> bool:
        """Whether a forward pass now keeps anything: in training, where a gradient of the input is wanted."""
        return self.saves(input=input) and input.requires_grad

    def unsaved(self, forward: Callable[[Tensor], Output], input: Tensor) -> Output:
        """What the plain ``forward`` makes of ``input``; in training without gradients on offer where ``input`` is."""
        if not self.training or torch.is_grad_enabled():
            return forward(input)
        known, output = offered(input), forward(input)
        if known is not None and isinstance(output, Tensor):
            offer(output, known._replace(stored=None))
        return output


def without_zeros(ctx: Any) -> None:
    """Have a backward pass be given None where no gradient comes, and not zeros."""
    if not is_traced():
        ctx.set_materialize_grads(False)


def none_for_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Have ``backward`` return no gradients where none comes, as PyTorch's operators do: a parameter then has none."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if grad_outputs[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grad_outputs)

    return checked


def save_mask(ctx: Any, mask: Tensor) -> None:
    """Save a bool tensor of any layout for backward, a bit per element, and nothing else."""
    flat, ctx.layout = flatten(mask)
    ctx.save_for_backward(ops.pack_bits(flat))


def save_range_mask(ctx: Any, x: Tensor, lower: float, upper: float) -> None:
    """Save where ``x``, of any layout, is neither at or below ``lower`` nor at or above ``upper``, as a mask."""
    flat, ctx.layout = flatten(x)
    ctx.save_for_backward(ops.range_bitmask(flat, lower, upper))


def saved_mask(ctx: Any) -> Tensor:
    """The mask that was saved."""
    (bits,) = ctx.saved_tensors
    return unflatten(ops.unpack_bits(bits, ctx.layout.numel), ctx.layout)


def apply_saved_mask(ctx: Any, grad: Tensor, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``grad`` where the mask that was saved is set, zeros elsewhere.

    ``backward``: PyTorch's operator that does so where a tensor is above zero, and says in which layout.
    """
    if is_traced() or is_mapped(grad):
        return torch.where(saved_mask(ctx), grad, 0)
    alike = memory_order(grad) == ctx.layout.order and is_dense_in_memory(grad)
    if torch.is_grad_enabled() or not alike:  # a second derivative is wanted, or another layout
        return backward(grad, saved_mask(ctx).to(grad.dtype))
    (bits,) = ctx.saved_tensors
    flat, layout = flatten(grad)
    kept = ops.apply_bitmask(flat, bits)
    return kept.view(grad.shape) if grad.is_contiguous() else unflatten(kept, layout)


def anchor(x: Tensor) -> Tensor | None:
    """No element of ``x``, but what depends on it under torch.func, for :func:`first_order_only`; None elsewhere."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return x.reshape(-1)[:0].clone()


def _no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "DropIT's layers have no forward-mode derivative; dropit.from_dropit(model) gives the plain layers back"
    )


class LayerFunction(Function):
    """What a layer calls to have a node of its own in the graph. Takes all arguments by position.

    A subclass has ``forward`` and ``setup_context`` apart, as torch.func wants it. Where nothing transforms the call, a
    class of both in one is called instead: PyTorch binds the arguments of the other to a signature, for 30 to 100 us.
    """

    _at_once: ClassVar[type[Function]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Make the class of both in one."""
        super().__init_subclass__(**keywords)

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            return cls.backward(ctx, *grads)

        methods = {"forward": forward, "backward": backward, "jvp": _no_forward_mode}
        methods = {name: staticmethod(method) for name, method in methods.items()}
        cls._at_once = type(cls.__name__, (Function,), methods)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The output of ``forward``, in the graph."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return cls._at_once.apply(*args)


class _FirstOrderOnly(Function):
    """Identity, in the graph of ``through``, that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, through: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:  # type: ignore[override]
        raise RuntimeError(
            "a gradient that was computed from a packed input cannot be differentiated again; "
            "dropit.from_dropit(model) gives second derivatives back"
        )


def first_order_only(grad: Tensor, through: Tensor | None = None) -> Tensor:
    """``grad``, which is an error to differentiate: autograd knows nothing of the input that was packed.

    ``through``: what requires a gradient wherever ``grad`` has a derivative, under torch.func an :func:`anchor` of what
    was packed; None where that cannot be told.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad  # no create_graph, so no second derivative
    if through is None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return grad  # torch.func differentiates always; a leaf from here would leak out of it
        through = torch.zeros((), requires_grad=True)
    return _FirstOrderOnly.apply(grad, through)  # type: ignore[no-any-return]


class _WithZeros(Function):
    """Identity, in the graph of ``link``, to which it gives a gradient of zeros."""

    @staticmethod
    def forward(grad: Tensor, link: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        without_zeros(ctx)
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, None) if grad is None else (grad, grad.new_zeros(ctx.shape))


def link_to(x: Tensor) -> tuple[Tensor] | None:
    """What :func:`with_zeros` takes, for a Function that saves nothing of ``x`` that is in its graph.

    In a tuple, which a Function takes as it is: no gradient goes that way but a second one.
    """
    if not x.requires_grad or is_traced():
        return None
    # No element of x, but in its graph, by an operator that saves nothing: 4 us.
    return (torch.constant_pad_nd(x, [0, -x.shape[-1]] if x.dim() else []),)


def with_zeros(grad: Tensor, link: tuple[Tensor] | None) -> Tensor:
    """``grad``, of which the derivative by the layer's input is zeros, and not none.

    So have PyTorch's operators it, whose derivative is constant but where it jumps: under a gradient penalty the
    parameters before them have gradients of zeros, which an optimizer with momentum or weight decay does not ignore.
    """
    if link is None or not torch.is_grad_enabled():
        return grad
    return _WithZeros.apply(grad, *link)  # type: ignore[no-any-return]


def as_non_view(output: Tensor) -> Tensor:
    """``output``, and not a view of another tensor, as ``F.linear`` makes them: those may not be changed in place."""
    return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]


def each(size: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number for each dimension, as PyTorch's functions take one for all."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


def save_form(ctx: Any, input: Tensor) -> None:
    """Remember the shape and the layout of ``input``, and none of its elements."""
    ctx.input_shape, ctx.memory_format = input.shape, suggest_memory_format(input)


def placeholder(ctx: Any, like: Tensor) -> Tensor:
    """A tensor of the form that :func:`save_form` saw, for operators that look at no more; dtype as ``like``."""
    return torch.empty(ctx.input_shape, dtype=like.dtype, device=like.device, memory_format=ctx.memory_format)


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """The format that PyTorch's operators take ``x`` to be in, told by its strides, with gaps or without."""
    order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())  # of channels_last, innermost first
    if order is None or 0 in x.shape or x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in order:
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(dim) * x.shape[dim]
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` laid out in that format, and so that operators take it for such, whatever dimensions are of size one."""
    if is_traced():
        return x.contiguous(memory_format=memory_format)
    if x.is_contiguous(memory_format=memory_format) and suggest_memory_format(x) == memory_format:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format).copy_(x)


# Of these is_autocast_enabled raises; is_autocast_available tells, but torch.compile does not follow it before 2.12.
_WITHOUT_AUTOCAST = ("meta", "vulkan")


def autocasts(device: str) -> bool:
    """Whether autocast is on for devices of that type."""
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast would make of the arguments of a Linear or Conv, done where autograd still sees it."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(_cast(tensor, dtype) for tensor in tensors)


def autocast_as(operator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast has it in for ``operator``, a pooling: told by its output of one element.

    Autocast does not know the operators behind it, which a layer calls, as they return more or have a backward.
    """
    device = x.device.type
    if x.dtype.itemsize > 2 or not autocasts(device):
        return x
    with torch.no_grad():
        one = operator(x.new_ones([1] * x.dim()))
    return x.to(one.dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)
