"""Second derivatives are exact where the packed input has no place in the formula, and an error where it has."""

import copy

import pytest
import torch
from torch import nn

import dropit

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv transposed": (nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
}


def pair(name, gamma=0.9):
    plain, shape = LAYERS[name]
    plain = copy.deepcopy(plain).double()
    return dropit.to_dropit(copy.deepcopy(plain), gamma=gamma), plain, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_penalty_is_exact(name, linear_loss):
    """Of a network with smooth activations, the norm of the input's gradient, as in WGAN-GP."""
    ours, plain, x = pair(name)
    results = []
    for module in (ours, plain):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        loss = y.sum() if linear_loss else y.tanh().sum()
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        parameters = [module.weight] if linear_loss else [module.weight, module.bias]
        results.append(torch.autograd.grad(grad.square().sum(), parameters))
    if linear_loss:
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    else:
        # Back through the forward pass the weight's gradient is once more the packed input's; the bias's is exact.
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_differentiating_the_weights_gradient_is_a_clear_error(name, needs_input):
    ours, _, x = pair(name)
    y = ours(x.requires_grad_(needs_input))
    (grad,) = torch.autograd.grad(y.square().sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again; dropit\.from_dropit"):
        grad.sum().backward()


def test_even_where_the_loss_is_linear():
    """The derivative by the input of grad_output^T input would be missing without a word."""
    ours, _, x = pair("linear")
    (grad,) = torch.autograd.grad(ours(x.requires_grad_()).sum(), ours.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (grad.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck_of_the_input_with_a_frozen_weight(name):
    ours, _, x = pair(name)
    ours.weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda x: ours(x).tanh(), x.requires_grad_())
