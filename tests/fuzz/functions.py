"""Functions of values: views, writes in place, combinations; and what a module does to the memory of its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import hooks


def writes(layer: nn.Module) -> bool:
    """Whether a layer may write to its input."""
    if isinstance(layer, nn.Sequential):
        return False
    first = getattr(layer, "inplace", False)
    return bool(first) or (may_return_its_input(layer) and hooks.has_writing_hook(layer))


def may_return_its_input(layer: nn.Module) -> bool:
    """Whether the output may share memory with the input."""
    inplace = bool(getattr(layer, "inplace", False))
    return inplace or isinstance(layer, (nn.Dropout, nn.Identity)) or hooks.has_any(layer)


def _split_last(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], 2, x.shape[-1] // 2)


def _as_image(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).permute(0, 2, 1, *range(3, x.dim() + 1))


def _narrow(dim: int, x: Tensor) -> Tensor:
    return x.narrow(dim, 0, max(1, x.shape[dim] - 1))


def _every_other(dim: int, x: Tensor) -> Tensor:
    return x.movedim(dim, -1)[..., ::2].movedim(-1, dim)


def _expand(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, 2, *x.shape[1:])


def _chunk(part: int, dim: int, x: Tensor) -> Tensor:
    return x.chunk(2, dim)[part]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def view_for(rng: Random, x: Tensor) -> tuple[Callable[[Tensor], Tensor], bool]:
    """A view or a copy in another layout, and whether one can write to it."""
    dim = rng.randint(1, max(1, x.dim() - 1))
    views: list[tuple[Callable[[Tensor], Tensor], bool]] = [
        (_split_last, True),
        (partial(torch.flatten, start_dim=1), True),
        (partial(torch.flatten, start_dim=max(1, x.dim() - 2)), True),
        (partial(torch.transpose, dim0=1, dim1=-1), True),
        (partial(torch.transpose, dim0=-1, dim1=-2), True),
        (partial(torch.transpose, dim0=0, dim1=1), True),
        (_as_image, True),
        (partial(_narrow, dim), True),
        (partial(_every_other, dim), True),
        (_expand, False),
        (partial(_chunk, rng.randint(0, 1), dim), False),
        (Tensor.contiguous, True),
        (_channels_last, True),
        (_channels_last, True),
        (partial(torch.select, dim=1, index=0), True),
        (partial(torch.unsqueeze, dim=1), True),
        (Tensor.detach, True),
        (partial(torch.flip, dims=(1,)), True),
        (partial(torch.mean, dim=1), True),
        (partial(torch.roll, shifts=1, dims=1), True),
        (Tensor.clone, True),
    ]
    return rng.choice(views)


def _write_slice(x: Tensor) -> Tensor:
    x[:, :1] = 0.5
    return x


def _fill_some(x: Tensor) -> Tensor:
    return x.masked_fill_(x.detach() > 0.5, 0.3)


def _without_graph(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        function(x)
    return x


def _scale(x: Tensor) -> Tensor:
    return x.mul_(0.8)


def _shift(x: Tensor) -> Tensor:
    return x.add_(0.1)


def write_for(rng: Random) -> Callable[[Tensor], Tensor]:
    """A write in place, one in three without autograd."""
    function = rng.choice(
        [
            _scale,
            _shift,
            Tensor.relu_,
            _fill_some,
            _write_slice,
            partial(F.silu, inplace=True),
            partial(F.leaky_relu, inplace=True),
            partial(F.dropout, p=0.3, inplace=True),
            Tensor.sigmoid_,
            partial(Tensor.clamp_, min=-1.0, max=1.0),
        ]
    )
    return partial(_without_graph, function) if rng.random() < 0.3 else function


def _beside(dim: int, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], dim)


def _write_over(x: Tensor, y: Tensor) -> Tensor:
    return x.copy_(y)


def _gate(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def _attend(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(x @ y.transpose(-1, -2), dim=-1) @ y


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / (y.square() + 1)


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


def call_for(rng: Random) -> Callable[[Tensor], Tensor]:
    """A function of a tensor, as a module's own code calls it."""
    return rng.choice(
        [
            F.relu,
            F.gelu,
            torch.sigmoid,
            Tensor.tanh,
            F.softplus,
            _normalize,
            Tensor.square,
            partial(F.softmax, dim=-1),
            partial(F.normalize, dim=-1),
            partial(F.dropout, p=0.3),
            partial(F.leaky_relu, negative_slope=0.2),
            partial(torch.linalg.vector_norm, dim=-1, keepdim=True),
            partial(torch.mul, other=0.5),
        ]
    )


def combination_for(rng: Random) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """A function of two tensors of one shape, and whether it writes to the first."""
    combinations: list[tuple[Callable[[Tensor, Tensor], Tensor], bool]] = [
        (torch.add, False),
        (torch.add, False),
        (torch.mul, False),
        (_gate, False),
        (_attend, False),
        (_divide, False),
        (torch.maximum, False),
        (partial(_beside, -1), False),
        (partial(_beside, 1), False),
        (Tensor.add_, True),
        (Tensor.mul_, True),
        (_write_over, True),
    ]
    return rng.choice(combinations)


def name_of(function: Callable[..., Tensor]) -> str:
    """A function's name, and the arguments that it is given beforehand."""
    if not isinstance(function, partial):
        return getattr(function, "__name__", str(function)).lstrip("_")
    given = [*map(_written, function.args), *(f"{name}={value}" for name, value in function.keywords.items())]
    return f"{name_of(function.func)}[{', '.join(given)}]"


def _written(argument: object) -> str:
    return name_of(argument) if callable(argument) else str(argument)
