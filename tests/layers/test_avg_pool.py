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

LAYERS = {
    "1d": (nn.AvgPool1d(3, 2, 1), (2, 4, 11)),
    "1d unbatched": (nn.AvgPool1d(2, ceil_mode=True), (4, 11)),
    "2d": (nn.AvgPool2d(3, stride=(2, 1), padding=1), (2, 4, 9, 8)),
    "2d inside only": (nn.AvgPool2d((2, 3), padding=1, count_include_pad=False, ceil_mode=True), (2, 4, 9, 8)),
    "2d divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 4, 8, 8)),
    "3d": (nn.AvgPool3d(2, padding=1), (2, 3, 6, 5, 4)),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(3), (2, 4, 11)),
    "adaptive 2d": (nn.AdaptiveAvgPool2d((3, None)), (2, 4, 9, 8)),
    "adaptive 2d to one": (nn.AdaptiveAvgPool2d(1), (2, 4, 9, 8)),
    "adaptive 3d": (nn.AdaptiveAvgPool3d((2, 3, 1)), (2, 3, 6, 5, 4)),
}


def swapped(plain):
    ours = copy.deepcopy(plain)
    swap_in(ours, SWAPS[type(plain)], Saver(SavePolicy(MinK())))
    return ours


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_pytorchs_to_the_bit_and_nothing_is_held(name, dtype, memory_format):
    plain, shape = LAYERS[name]
    if name == "3d" and dtype is torch.bfloat16:
        pytest.skip("PyTorch has no such kernel on the CPU")
    x = torch.randn(shape).to(dtype)
    x = (x.to(memory_format=memory_format) if len(shape) == 4 else x).requires_grad_()
    ours = swapped(plain)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    exact = plain(x * 1)
    assert torch.equal(y, exact)
    assert meter.total_bytes == 0
    grad_output = torch.randn_like(y)
    (got,), (expected,) = torch.autograd.grad(y, x, grad_output), torch.autograd.grad(exact, x, grad_output)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()


def test_its_second_derivative_is_exact():
    pool = swapped(nn.AvgPool2d(2))
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: pool(x) ** 2, x)
