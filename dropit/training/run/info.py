"""What a training step would compute and hold, told without taking it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dropit import coverage, estimate_cache

MIB = 2**20


def describe(
    title: str,
    plain: Callable[[], nn.Module],
    converted: Callable[[], nn.Module] | None,
    input_shape: Sequence[int],
    *,
    moments: int,
    budget: int = 0,
) -> None:
    """Print the model's size and work, its coverage, its cache and the memory that a step is predicted to need.

    ``plain`` and ``converted`` build the model; ``converted`` is None where nothing is dropped. ``input_shape``: of
    one process's batch, (N, C, H, W). ``moments``: tensors that the optimizer keeps for each parameter. ``budget``:
    bytes that the cache may have, if not 0; how they are spent is measured only when training starts.
    """
    plain_model = _on_meta(plain)
    model = plain_model if converted is None else _on_meta(converted)
    shape = " x ".join(map(str, input_shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model        {title}, {parameters / 1e6:.2f} M parameters")
    print(f"input        {shape}, float32, on each process")
    print(f"work         {_flops(model, input_shape) / 1e9:.2f} GFLOP per sample, forward; three times that in a step")
    if converted is not None:
        _print_coverage(model)
    if budget:
        print(f"budget       {budget / MIB:g} MiB of cache, spent as measured when training starts; not in the tables")
    print()
    cache = estimate_cache(model, input_shape)
    if converted is None:
        cache.show()
    else:
        cache.show(estimate_cache(plain_model, input_shape))
    print()
    _print_peak(model, input_shape, budget or cache.total_bytes, moments=moments)


def state_sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of weights and buffers, and of the gradients that a step has."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights, sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model without its values, in training mode."""
    try:
        with torch.device("meta"):
            return build().train()
    except NotImplementedError:  # its first weights depend on values, as a RegNet's
        return build().to("meta").train()


def _print_coverage(model: nn.Module) -> None:
    report = coverage(model)
    print(f"layers       {report.summary()}")
    rest = Counter((row.type, row.reason) for row in report if row.reason)
    for (kind, reason), count in rest.most_common():
        print(f"             {kind} x{count}: {reason}")


def _flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Of one sample's forward pass; a multiplication and an addition are two."""
    x = torch.empty((1, *input_shape[1:]), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    model.train()
    return int(counter.get_total_flops())


def _print_peak(model: nn.Module, input_shape: Sequence[int], cache: int, *, moments: int) -> None:
    weights, gradients = state_sizes(model)
    parts = {
        "weights and buffers": weights,
        "gradients": gradients,
        "optimizer state": moments * gradients,
        "cache": cache,
        "largest transient": _largest_transient(model, input_shape),
    }
    print("predicted peak of a step, MiB")
    for name, nbytes in parts.items():
        print(f"  {name:20}{nbytes / MIB:10.1f}")
    print(f"  {'total':20}{sum(parts.values()) / MIB:10.1f}")


def _largest_transient(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes of what the backward pass of one layer has at a time: the rebuilt input and both gradients."""
    sizes = [0]

    def measure(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            sizes.append(2 * args[0].nbytes + output.nbytes)

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(measure) for module in leaves]
    with torch.no_grad():
        model(torch.empty(tuple(input_shape), device="meta"))
    for handle in handles:
        handle.remove()
    return max(sizes)
