"""What the layer tests share: strategies to test with, and gradients by plain PyTorch from the masked input."""

import torch

from dropit import ops


def masked(saver, x, **dims):
    """x as the layer's backward sees it: what the saver keeps, zeros elsewhere."""
    return ops.unpack(saver._strategy("input").pack(x.detach(), value_dtype=saver.policy.value_dtype, **dims))


def gradients(outputs, grad_output, inputs):
    return torch.autograd.grad(outputs, inputs, grad_output, retain_graph=True)
