"""What the layer tests share: strategies to test with, and gradients by plain PyTorch from the masked input."""

import torch

from dropit import ops


def masked(packer, x, **dims):
    """x as the layer's backward sees it: what the packer keeps, zeros elsewhere."""
    x = x.detach()
    return ops.unpack(packer.pack(x, x, **dims))


def gradients(outputs, grad_output, inputs):
    return torch.autograd.grad(outputs, inputs, grad_output, retain_graph=True)
