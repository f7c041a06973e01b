import copy

import pytest
import torch
from torch import nn

import dropit
from dropit.layers.activation import CURVES

LAYERS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardswish in place": nn.Hardswish(inplace=True),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


def quantized(plain, compress):
    return dropit.to_dropit(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(plain)]), compress=compress)[1]


def gradient(module, x, grad_output):
    x = x.detach().requires_grad_()
    y = module(x * 1)
    return y, torch.autograd.grad(y, x, grad_output)[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CURVES)
def test_the_grid_reaches_all_derivatives_and_has_zero_and_one(name, bits):
    curve = CURVES[name]
    x = torch.linspace(-30, 30, 1_000_001, dtype=torch.float64)
    derivative = curve.derivative(x)
    assert curve.low <= derivative.min()
    assert derivative.max() <= curve.high
    step, lowest = curve.grid(bits)
    assert lowest * step <= curve.low
    assert (lowest + 2**bits - 1) * step >= curve.high
    assert (curve.one / step) == pytest.approx(round(curve.one / step))
    assert step < 1.5 * (curve.high - curve.low) / (2**bits - 1)


@pytest.mark.parametrize("compress", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_derivative_is_the_exact_one_rounded_to_the_grid(name, dtype, compress):
    plain = LAYERS[name]
    ours = quantized(plain, compress)
    x = (torch.randn(7, 33) * 3).to(dtype)
    grad_output = torch.randn_like(x)
    y, got = gradient(ours, x, grad_output)
    exact_y, exact = gradient(plain, x, torch.ones_like(x))
    assert torch.equal(y, exact_y)
    step, _ = CURVES[name.removesuffix(" in place")].grid(8 if compress == "int8" else 4)
    rounded = (exact.double() / step).round() * step
    close = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    off = (got.double() - grad_output.double() * rounded).abs() > 1e-4 + 0.02 * (dtype is torch.bfloat16)
    if dtype is torch.bfloat16:
        # A derivative in bfloat16 may lie on either side of a middle between two steps.
        assert off.double().mean() < 0.3
        assert (got - grad_output * exact).abs().max() <= (0.51 * step + 0.02) * grad_output.abs().max()
    else:
        torch.testing.assert_close(got.double(), grad_output.double() * rounded, **close)


@pytest.mark.parametrize(("compress", "nbytes"), [("int8", 1001), ("int4", 501)])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_held(name, compress, nbytes):
    ours = quantized(LAYERS[name], compress)
    x = torch.randn(7, 11, 13, requires_grad=True)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    assert meter.total_bytes == nbytes
    y.sum().backward()


def test_a_half_of_a_gated_mlp_stays_as_it_is():
    """Its storage is held whole by the product: a stored derivative would come on top."""
    ours = quantized(nn.SiLU(), "int8")
    with dropit.CacheMeter(ours) as meter:
        gate, value = torch.randn(8, 64, requires_grad=True).mul(1).chunk(2, dim=-1)
        y = ours(gate) * value
    assert meter.total_bytes == 4 * 8 * (64 + 32)
    y.sum().backward()


def test_what_does_not_pass_does_not_leak():
    ours = quantized(nn.GELU(), "int4")
    _, grad = gradient(ours, torch.tensor([-20.0, 20.0]), torch.ones(2))
    assert grad.tolist() == [0.0, 1.0]


def test_a_second_derivative_is_a_clear_error():
    ours = quantized(nn.GELU(), "int8")
    x = torch.randn(10, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_stochastic_rounding_is_right_on_average_and_seeded():
    def make(seed):
        layers = nn.ModuleList([nn.Linear(2, 2), nn.GELU()])
        return dropit.to_dropit(layers, compress="int4", stochastic=True, seed=seed)[1]

    x = torch.linspace(-2, 2, 100)
    _, exact = gradient(nn.GELU(), x, torch.ones(100))
    ours = make(1)
    grads = torch.stack([gradient(ours, x, torch.ones(100))[1] for _ in range(2000)])
    torch.testing.assert_close(grads.mean(dim=0), exact, rtol=0, atol=0.01)
    again = make(1)
    before = torch.get_rng_state()
    assert torch.equal(gradient(again, x, torch.ones(100))[1], grads[0])
    assert torch.equal(torch.get_rng_state(), before)
