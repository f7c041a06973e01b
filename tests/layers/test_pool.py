import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dropit
from dropit.convert import swap_in
from dropit.layers import SWAPS
from dropit.policy import SavePolicy
from dropit.saver import Saver
from dropit.strategies import MinK

POOLS = [
    nn.MaxPool1d(3),
    nn.MaxPool1d(2, stride=1, padding=1),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 3)),
    nn.MaxPool2d(3, stride=2, ceil_mode=True),
    nn.MaxPool2d(16, stride=4, padding=7),
    nn.MaxPool3d(2),
    nn.MaxPool3d((2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), dilation=(1, 1, 2), ceil_mode=True),
]
SIZES = {1: (17,), 2: (17, 14), 3: (7, 9, 8)}


def swapped(plain):
    ours = copy.deepcopy(plain)
    swap_in(ours, SWAPS[type(plain)], Saver(SavePolicy(MinK())))
    return ours


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("plain", POOLS, ids=str)
def test_outputs_and_gradients_are_pytorchs_bit_for_bit(plain, batched):
    ours = swapped(plain)
    shape = (2, 3) if batched else (3,)
    for x in (torch.randn(*shape, *SIZES[ours.dimensions]), torch.zeros(*shape, *SIZES[ours.dimensions])):
        x[..., 0] = float("nan")
        x.requires_grad_()
        y, exact = ours(x), plain(x)
        torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
        grad_output = torch.randn_like(y)
        (grad,), (exact_grad,) = (torch.autograd.grad(out, x, grad_output) for out in (y, exact))
        assert torch.equal(grad, exact_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last(dtype):
    plain = nn.MaxPool2d(3, stride=2, padding=1)
    x = torch.randn(2, 8, 17, 14).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    y, exact = swapped(plain)(x), plain(x)
    assert torch.equal(y, exact)
    assert y.stride() == exact.stride()
    grad_output = torch.randn_like(y)
    (grad,), (exact_grad,) = (torch.autograd.grad(out, x, grad_output) for out in (y, exact))
    assert torch.equal(grad, exact_grad)
    assert grad.stride() == exact_grad.stride()


@pytest.mark.parametrize(("kernel", "bits"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (16, 8)])
def test_the_offsets_take_the_fewest_bits(kernel, bits):
    pool = swapped(nn.MaxPool2d(kernel))
    x = torch.randn(2, 8, 32, 32).requires_grad_()
    with dropit.CacheMeter(pool) as meter:
        y = pool(x * 1)
    assert meter.total_bytes == -(-y.numel() * bits // 8)


def test_a_window_too_large_for_a_byte_stays_as_it_is():
    pool = swapped(nn.MaxPool2d(17))
    x = torch.randn(1, 1, 17, 17).requires_grad_()
    (grad,) = torch.autograd.grad(pool(x).sum(), x)
    assert grad.sum() == 1


def test_returned_indices_are_pytorchs():
    plain = nn.MaxPool2d(2, return_indices=True)
    x = torch.randn(1, 2, 6, 6).requires_grad_()
    assert all(map(torch.equal, swapped(plain)(x), plain(x)))


def test_sizes_set_after_construction_may_be_one_number_or_none():
    for later in ({"kernel_size": (3,)}, {"stride": None}, {"stride": (1,), "padding": (1,)}, {"ceil_mode": True}):
        plain = nn.MaxPool2d(2)
        for name, value in later.items():
            setattr(plain, name, value)
        x = torch.randn(2, 3, 9, 8).requires_grad_()
        assert torch.equal(swapped(plain)(x), plain(x))


def test_what_is_kept_between_passes_is_not_of_fake_tensors():
    pool, shape = swapped(nn.MaxPool2d(2, stride=1)), (1, 2, 11, 13)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pool(torch.randn(shape, requires_grad=True)).sum().backward()
    x = torch.randn(shape, requires_grad=True)
    pool(x).sum().backward()
    assert type(x.grad) is torch.Tensor


@pytest.mark.parametrize("share", [0.01, 0.7, 1.0])
@pytest.mark.parametrize(
    ("plain", "memory_format"), [(nn.MaxPool2d(2), torch.channels_last), (nn.MaxPool3d(2), torch.channels_last_3d)]
)
def test_where_all_of_a_window_is_minus_infinity_the_gradient_is_pytorchs(plain, memory_format, share):
    """Whose indices may be of another window then."""
    x = torch.randn(2, 3, *SIZES[2 if plain.__class__ is nn.MaxPool2d else 3])
    x[torch.rand_like(x) < share] = -float("inf")
    x[..., :2, :2] = -float("inf")
    x = x.to(memory_format=memory_format).requires_grad_()
    grads = [torch.autograd.grad(pool(x), x, torch.ones_like(pool(x)))[0] for pool in (swapped(plain), plain)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], ids=str)
def test_under_vmap_it_is_the_plain_layer(pool):
    x = torch.randn(4, 2, 6, 6)
    ours = dropit.to_dropit(nn.Sequential(copy.deepcopy(pool), nn.Conv2d(2, 2, 1)), gamma=0, compress="lossless")[0]
    grads = [torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).square().sum()))(x) for f in (ours, pool)]
    assert torch.equal(*grads)
