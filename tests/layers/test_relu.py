import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropit
from dropit.convert import swap_in
from dropit.layers import SWAPS
from dropit.policy import SavePolicy
from dropit.saver import Saver
from dropit.strategies import MinK

ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(), nn.LeakyReLU(0.3)]
SPECIAL = torch.tensor([0.0, -0.0, 6.0, -1.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-30])


def swapped(plain):
    ours = copy.deepcopy(plain)
    swap_in(ours, SWAPS[type(plain)], Saver(SavePolicy(MinK())))
    return ours


def output_and_gradient(activation, x, grad_output):
    x = x.clone().requires_grad_()
    y = activation(x * 1)  # not a leaf, which may not change in place
    (grad,) = torch.autograd.grad(y, x, grad_output)
    return y, grad


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("plain", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_and_gradients_are_pytorchs_bit_for_bit(plain, inplace, dtype):
    plain = copy.deepcopy(plain)
    plain.inplace = inplace
    for shape in [(7,), (3, 5, 4, 6), (0, 3)]:
        x = torch.cat([torch.randn(shape).flatten() * 4, SPECIAL]).to(dtype)
        if isinstance(plain, nn.Hardtanh):
            x = x.nan_to_num(2.0)  # PyTorch's own gradient of NaN depends on its place in the tensor
        grad_output = torch.randn_like(x)
        grad_output[0] = float("inf")
        for ours, exact in zip(
            output_and_gradient(swapped(plain), x, grad_output),
            output_and_gradient(plain, x, grad_output),
            strict=True,
        ):
            torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("plain", ACTIVATIONS, ids=str)
def test_a_bit_per_element_is_held(plain):
    ours = swapped(plain)
    x = torch.randn(4, 3, 8, 8).requires_grad_()
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    assert meter.total_bytes == x.numel() / 8
    del y


def test_any_layout():
    relu = swapped(nn.ReLU())
    for x in (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(6, 4).t()):
        x.requires_grad_()
        y = relu(x)
        assert y.stride() == F.relu(x).stride()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, (x > 0).float())


def test_in_place_it_changes_its_input_and_allocates_no_other():
    relu = swapped(nn.ReLU(inplace=True))
    x = torch.randn(10, requires_grad=True) * 1
    assert relu(x) is x
    assert (x >= 0).all()


def test_a_leaky_relu_that_hides_the_sign_stays_as_it_is():
    for slope in (0.0, -0.5):
        plain = nn.LeakyReLU(slope)
        x, grad_output = torch.randn(20), torch.randn(20)
        ours = output_and_gradient(swapped(plain), x, grad_output)
        assert all(map(torch.equal, ours, output_and_gradient(plain, x, grad_output)))


def test_double_backward_is_exact():
    relu = swapped(nn.ReLU())
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: relu(x) ** 3, x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_a_gradient(context):
    relu = swapped(nn.ReLU())
    with context():
        assert not relu(torch.randn(3, requires_grad=True)).requires_grad


def test_it_lets_a_convolution_drop_its_input():
    """BatchNorm, ReLU, Conv: the point of it. Plain ReLU would hold the dense tensor and ours a copy on top."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    x = torch.randn(16, 8, 12, 12)
    held = {}
    for compress in ("none", "lossless"):
        dropit.to_dropit(model, gamma=0.9, compress=compress)
        with dropit.CacheMeter(model) as meter:
            y = model(x)
        held[compress] = meter.total_bytes
        del y
    assert held["none"] - held["lossless"] == x.nbytes - x.numel() // 8


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("bounds", [(-0.3, 0.7), (-0.5, 0.1), (-1e-9, 6.1), (0.0, 6.0), (-1, 1), (-1.0, float("inf"))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_bounds_that_the_dtype_cannot_hold(bounds, dtype, inplace):
    """PyTorch clamps to the nearest numbers, and lets the gradient pass between those that were asked for."""
    plain = nn.Hardtanh(*bounds, inplace=inplace)
    near = torch.tensor(bounds).nan_to_num(posinf=1e4).to(dtype)
    steps = [near, near.nextafter(near - 1), near.nextafter(near + 1)]
    x = torch.cat([torch.linspace(-2, 2, 4001).to(dtype), *steps])
    grad_output = torch.randn_like(x)
    got, expected = (output_and_gradient(module, x, grad_output) for module in (swapped(plain), plain))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("plain", [nn.ReLU(), nn.MaxPool2d(2)], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_was_made_by_hand_shares_nothing_and_works(plain):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer = SWAPS[type(plain)](*([2] if isinstance(plain, nn.MaxPool2d) else []))
    grads = [torch.autograd.grad(module(x).sum(), x)[0] for module in (plain, layer)]
    assert torch.equal(*grads)
