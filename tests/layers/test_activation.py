import copy

import pytest
import torch
from torch import nn

import dropit
from dropit import ops
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


@pytest.mark.parametrize("name", CURVES)
def test_the_gradient_is_that_of_the_function(name):
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn_like(x)
    (exact,) = torch.autograd.grad(CURVES[name].function(x * 1, False), x, grad_output)
    torch.testing.assert_close(CURVES[name].backward(grad_output, x.detach()), exact)


@pytest.mark.parametrize("compress", ["int16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_that_at_the_quantized_input(name, dtype, compress):
    plain = LAYERS[name]
    ours = quantized(plain, compress)
    x = (torch.randn(7, 33) * 3).to(dtype)
    grad_output = torch.randn_like(x)
    y, got = gradient(ours, x, grad_output)
    assert torch.equal(y, plain(x.clone()))
    rounded = ops.unpack(ours.packer.quantize(x))
    assert torch.equal(rounded, x) == (dtype is torch.bfloat16 and compress == "int16")  # which takes no less
    _, exact = gradient(plain, rounded, grad_output)
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize(("compress", "nbytes"), [("int16", 2002), ("int8", 1001), ("int4", 501)])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_held(name, compress, nbytes):
    ours = quantized(LAYERS[name], compress)
    x = torch.randn(7, 11, 13, requires_grad=True)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    assert meter.total_bytes == nbytes + 2 * 32  # and 32 scales
    y.sum().backward()


def test_a_layer_that_reads_the_output_stores_nothing():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.GELU(), nn.Linear(64, 8))
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.9, compress="int8")
    x = torch.randn(32, 64, requires_grad=True)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x)
    assert meter.by_operator() == {"DropITActivation + DropITLinear": 2048 + 2 * 64}
    grad_output = torch.randn_like(y)
    weights = ours[1].weight, plain[1].weight
    got, exact = (torch.autograd.grad(out, w, grad_output)[0] for out, w in zip((y, plain(x)), weights, strict=True))
    assert 0 < (got - exact).norm() < 0.02 * exact.norm()


def test_a_half_of_a_gated_mlp_stays_as_it_is():
    """Its storage is held whole by the product: a quantized one would come on top."""
    ours = quantized(nn.SiLU(), "int8")
    with dropit.CacheMeter(ours) as meter:
        gate, value = torch.randn(8, 64, requires_grad=True).mul(1).chunk(2, dim=-1)
        y = ours(gate) * value
    assert meter.total_bytes == 4 * 8 * (64 + 32)
    y.sum().backward()


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
    ours = make(1)
    rounded = torch.stack([ops.unpack(ours.packer.quantize(x)) for _ in range(2000)])
    torch.testing.assert_close(rounded.mean(dim=0), x, rtol=0, atol=0.01)
    ours = make(1)
    grads = [gradient(ours, x, torch.ones(100))[1] for _ in range(2)]
    assert not torch.equal(*grads)
    again = make(1)
    before = torch.get_rng_state()
    assert torch.equal(gradient(again, x, torch.ones(100))[1], grads[0])
    assert torch.equal(torch.get_rng_state(), before)
