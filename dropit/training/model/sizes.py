"""The sizes of a model and of its training step, from shapes alone: for models on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the model without its values, in training mode."""
    try:
        with torch.device("meta"):
            return build().train()
    except NotImplementedError:  # its initial weights depend on values, as a RegNet's
        return build().to("meta").train()


def state_sizes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of weights and buffers, and of the gradients of a step."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights, sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def step_memory(model: nn.Module, input_shape: Sequence[int], cache: int, optimizer_slots: int) -> dict[str, int]:
    """Return the bytes of a step's parts, by name, whose sum is its predicted peak.

    ``cache``: what is saved for backward; ``optimizer_slots``: tensors that the optimizer keeps for each parameter.
    """
    weights, gradients = state_sizes(model)
    return {
        "weights and buffers": weights,
        "gradients": gradients,
        "optimizer state": optimizer_slots * gradients,
        "cache": cache,
        "largest transient": largest_transient(model, input_shape),
    }


def forward_flops(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the operations of one sample's forward pass; a multiplication and an addition are two."""
    x = torch.empty((1, *input_shape[1:]), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    model.train()
    return int(counter.get_total_flops())


def largest_transient(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the bytes that one layer's backward pass has at a time: the rebuilt input and both gradients."""
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
