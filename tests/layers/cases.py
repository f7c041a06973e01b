"""What the layer tests share: strategies to test with, and gradients by plain PyTorch from the masked input."""

import torch

from dropit import ops


def masked(strategy, x, **dims):
    """x as the layer's backward sees it: what the strategy keeps, zeros elsewhere."""
    return ops.unpack(strategy.pack(x.detach(), **dims))


def gradients(outputs, grad_output, inputs):
    return torch.autograd.grad(outputs, inputs, grad_output, retain_graph=True)
