"""Frozen inputs, weights and biases: neither the work nor the memory is ever above plain PyTorch's."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dropit

LAYERS = {
    "linear": (nn.Linear(64, 48), (32, 64)),
    "conv": (nn.Conv2d(8, 12, 3, padding=1), (4, 8, 16, 16)),
    "conv transposed": (nn.ConvTranspose2d(8, 12, 3, stride=2), (4, 8, 8, 8)),
}


def cost(module, x):
    """FLOPs of forward and backward, bytes held between, and the gradients."""
    leaves = [leaf for leaf in (x, module.weight, module.bias) if leaf.requires_grad]
    with FlopCounterMode(display=False) as counter:
        with dropit.CacheMeter(module) as meter:
            y = module(x)
        if leaves:
            y.sum().backward()
    return counter.get_total_flops(), meter.total_bytes, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize(
    "wanted", itertools.product([True, False], repeat=3), ids=lambda w: "".join("-g"[i] for i in w)
)
@pytest.mark.parametrize("name", LAYERS)
def test_never_more_than_plain(name, wanted, gamma):
    plain, shape = LAYERS[name]
    plain = copy.deepcopy(plain)
    for parameter, wants in zip((plain.weight, plain.bias), wanted[1:], strict=True):
        parameter.requires_grad_(wants)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=gamma)
    x = torch.randn(shape, requires_grad=wanted[0])
    flops, held, grads = cost(ours, x.detach().clone().requires_grad_(wanted[0]))
    plain_flops, plain_held, plain_grads = cost(plain, x)
    assert flops <= plain_flops
    assert held <= plain_held
    if gamma == 0:
        torch.testing.assert_close(grads, plain_grads)


@pytest.mark.parametrize("name", LAYERS)
def test_with_a_frozen_weight_nothing_of_the_input_is_held(name):
    plain, shape = LAYERS[name]
    ours = dropit.to_dropit(copy.deepcopy(plain))
    ours.weight.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    _, held, grads = cost(ours, x)
    assert held == 0
    exact = torch.autograd.grad(plain(x).sum(), [x, plain.bias])
    torch.testing.assert_close(grads, list(exact), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "out_proj.weight", "all"])
def test_attention_with_frozen_projections(frozen):
    plain = nn.MultiheadAttention(32, 4, batch_first=True)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(frozen not in ("all", name))
    ours = dropit.to_dropit(copy.deepcopy(plain))
    x = torch.randn(4, 16, 32, requires_grad=True)
    costs = []
    for module in (ours, plain):
        with FlopCounterMode(display=False) as counter:
            with dropit.CacheMeter(module) as meter:
                y = module(x, x, x, need_weights=False)[0]
            y.sum().backward()
        costs.append((counter.get_total_flops(), meter.total_bytes))
    assert costs[0][0] <= costs[1][0]
    assert costs[0][1] <= costs[1][1]
