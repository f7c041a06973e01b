"""The scheme of the first release, to compare with: top-k of each Linear and Conv2d input, with int32 positions.

Other layers still save what is dropped. Selection is by magnitude over the whole tensor, as the paper has it. Under
autocast, where the release fails, it is given what PyTorch's own layers would compute with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dropit.layers.formats import autocast


def _sparse(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1)
    positions = flat.abs().topk(int(len(flat) * (1 - gamma)), sorted=False).indices
    return flat[positions], positions.to(torch.int32)


def _dense(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros(shape.numel()).scatter_(0, positions.long(), values).view(shape)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float) -> Tensor:  # type: ignore[override]
        ctx.shape = x.shape
        ctx.save_for_backward(weight, *_sparse(x, gamma))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, values, positions = ctx.saved_tensors
        x, rows = _dense(values, positions, ctx.shape), grad.flatten(0, -2)
        return grad @ weight, rows.t() @ x.flatten(0, -2), rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, gamma: float) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.geometry = x.shape, geometry
        ctx.save_for_backward(weight, *_sparse(x, gamma))
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, values, positions = ctx.saved_tensors
        x, wanted = _dense(values, positions, ctx.shape), ctx.needs_input_grad[:3]
        bias = [grad.shape[1]]
        grads = torch.ops.aten.convolution_backward(grad, x, weight, bias, *ctx.geometry, wanted)
        return *grads, None, None


def to_published(model: nn.Module, gamma: float) -> nn.Module:
    """Give each Linear and Conv2d of ``model`` a forward of the first release. Returns the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = lambda x, m=module: _Linear.apply(*autocast(x, m.weight, m.bias), gamma)  # type: ignore[method-assign]
        elif type(module).__name__ == "Conv1D":  # Hugging Face's linear layer, (in, out)
            module.forward = lambda x, m=module: _Linear.apply(*autocast(x, m.weight.t(), m.bias), gamma)  # type: ignore[method-assign]
        elif type(module) is nn.Conv2d:
            geometry = (module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
            module.forward = lambda x, m=module, g=geometry: _Conv2d.apply(*autocast(x, m.weight, m.bias), g, gamma)  # type: ignore[method-assign]
    return model
