import copy

import pytest
import torch
from torch import nn

import dropit
from dropit.convert import swap_in
from dropit.layers import SWAPS
from dropit.policy import SavePolicy
from dropit.saver import Saver
from dropit.strategies import MinK


def swapped(plain):
    ours = copy.deepcopy(plain)
    swap_in(ours, SWAPS[type(plain)], Saver(SavePolicy(MinK())))
    return ours


def run(module, x, grad_output):
    torch.manual_seed(5)
    y = module(x)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    return y, grad, torch.get_rng_state()


@pytest.mark.parametrize("p", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mask_outputs_gradients_and_random_numbers_are_pytorchs(p, dtype):
    plain = nn.Dropout(p)
    for x in (torch.randn(7, 33), torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)):
        x = x.to(dtype).requires_grad_()
        grad_output = torch.randn_like(x)
        ours, exact = run(swapped(plain), x, grad_output), run(plain, x, grad_output)
        assert all(map(torch.equal, ours, exact))


def test_a_bit_per_element_is_held():
    dropout = swapped(nn.Dropout(0.1))
    x = torch.randn(80, 33, requires_grad=True)
    with dropit.CacheMeter(dropout) as meter:
        y = dropout(x * 1)
    assert meter.total_bytes == 80 * 33 / 8
    del y


def test_evaluation_and_inplace_are_plain():
    x = torch.randn(30, requires_grad=True)
    assert torch.equal(swapped(nn.Dropout(0.5)).eval()(x), x)
    y = x * 1
    assert swapped(nn.Dropout(0.5, inplace=True))(y) is y
