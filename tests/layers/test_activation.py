import copy
import math

import pytest
import torch
from torch import nn

import dropit
from dropit import ops
from dropit.layers.activation import CURVES
from dropit.ops import reference

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


def kept(ours, x):
    """What the layer keeps of ``x``, in its place: the output of a sigmoid or tanh from its center, inverted."""
    curve, saver = CURVES[ours.curve], ours.saver
    if not saver.policy.narrows(x):
        return x
    if curve.center is None:
        return ops.unpack(saver.quantize(x.clamp(min=curve.floor[saver.bits])))
    y = ops.unpack(saver.quantize(ours(x).detach() - curve.center)) + curve.center
    y = y.clamp(2 * curve.center - 1, 1).double()
    return y.logit() if curve.center else y.atanh()


@pytest.mark.parametrize("name", CURVES)
def test_the_gradient_is_that_of_the_function(name):
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn_like(x)
    y = CURVES[name].function(x * 1, False)
    (exact,) = torch.autograd.grad(y, x, grad_output)
    of = x if CURVES[name].center is None else y
    torch.testing.assert_close(CURVES[name].backward(grad_output, of.detach()), exact)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", [name for name, curve in CURVES.items() if curve.floor and name != "softplus"])
def test_to_the_left_of_its_floor_a_function_has_vanished(name, bits):
    curve, levels = CURVES[name], reference.CODES[bits][0]
    floor = curve.floor[bits]
    x = torch.linspace(-100, floor, 10_001, dtype=torch.float64)
    assert CURVES[name].function(x, False).abs().max() < -floor / (2 * levels)
    assert CURVES[name].backward(torch.ones_like(x), x).abs().max() < 1 / (2 * levels)


@pytest.mark.parametrize("compress", ["int16", "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_that_at_what_is_quantized(name, dtype, compress):
    plain = LAYERS[name]
    ours = quantized(plain, compress)
    x = (torch.randn(7, 33) * 3).to(dtype)
    grad_output = torch.randn_like(x)
    y, got = gradient(ours, x, grad_output)
    assert torch.equal(y, plain(x.clone()))
    rounded = kept(ours, x.clone())
    assert torch.equal(rounded, x) == (dtype is torch.bfloat16 and compress == "int16")  # which takes no less
    _, exact = gradient(plain, rounded, grad_output.to(rounded.dtype))
    torch.testing.assert_close(
        got,
        exact.to(dtype),
        atol=1e-6 if dtype is torch.float32 else None,
        rtol=1e-5 if dtype is torch.float32 else None,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_in_sixteen_bits_no_element_crosses_a_jump_of_the_slope(dtype):
    plain, ours = LAYERS["hardswish"], quantized(LAYERS["hardswish"], "int16")
    x = torch.randn(200, 64).clamp(-2.9, 2.9).to(dtype)
    jumps = torch.tensor([3.0, -3.0]).to(dtype).expand(200, 2)
    x[:, :2] = jumps
    x[:, 2:4] = torch.nextafter(jumps, torch.zeros_like(jumps))
    x[:, 4:6] = torch.nextafter(jumps, 4 * jumps)
    _, got = gradient(ours, x, torch.ones_like(x))
    _, exact = gradient(plain, x, torch.ones_like(x))
    assert (got - exact).abs().max() < 1e-3


def test_a_huge_element_puts_none_of_its_group_on_another_side():
    x = torch.full((2, 32), 5.0)
    x[:, 3] = 4e5  # beside which 5 is rounded to 0
    _, got = gradient(quantized(LAYERS["hardswish"], "int16"), x, torch.ones_like(x))
    assert torch.equal(got, torch.ones_like(x))


def test_nor_does_one_that_a_normalization_gives_back():
    plain = nn.Sequential(nn.LayerNorm(64), nn.Hardswish(), nn.Linear(64, 4))
    nn.init.constant_(plain[0].bias, 3)  # where most elements are
    x, results = torch.randn(4000, 64), []
    for compress in ("lossless", "int16", "int8"):
        ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0, compress=compress)
        results.append(torch.autograd.grad(ours(x).sum(), [ours[0].weight, ours[0].bias]))
    exact, near, rounded = results
    assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(near, exact, strict=True))
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(rounded, exact, strict=True))  # this finds a crossing


@pytest.mark.parametrize("value", [-1e4, -math.inf], ids=str)
@pytest.mark.parametrize("compress", ["int16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_what_saturates_costs_its_neighbours_nothing(name, dtype, compress, value):
    plain, ours = LAYERS[name], quantized(LAYERS[name], compress)
    curve, bits = CURVES[ours.curve], int(compress[3:])
    x = torch.randn(100, 32).clamp(-2.5, 2.5).to(dtype)  # no slope jumps there
    grad_output = torch.ones_like(x)
    huge = torch.zeros_like(x, dtype=torch.bool)
    huge[::2, 3] = huge[1::4, 20:] = True
    _, slopes = gradient(plain, x.double(), grad_output.double())
    usual = (gradient(ours, x, grad_output)[1] - slopes).abs().max()
    x[huge] = value
    y, got = gradient(ours, x, grad_output)
    assert torch.equal(y.nan_to_num(), plain(x.clone()).nan_to_num())
    half_step = (-curve.floor[bits] if curve.floor else 1) / (2 * reference.CODES[bits][0])
    assert (got - slopes).abs()[~huge].max() <= 1.1 * usual + half_step
    _, exact = gradient(plain, x, grad_output)
    narrowed = ours.saver.policy.narrows(x)
    assert got.isfinite().all() if narrowed else torch.equal(got.isfinite(), exact.isfinite())
    assert got[huge].nan_to_num(0).abs().max() <= {16: 1e-4, 8: 0.01, 4: 0.1}[bits]


@pytest.mark.parametrize("compress", ["int16", "int8", "int4"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_infinity_to_the_right_has_no_slope_either(name, compress):
    x = torch.randn(4, 32)
    x[:, 5] = math.inf
    _, got = gradient(quantized(LAYERS[name], compress), x, torch.ones_like(x))
    assert got.isfinite().all()
    assert got[:, 5].abs().max() < 0.01


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_a_reader_gets_the_stored_output_and_stores_nothing(name):
    torch.manual_seed(0)
    plain = nn.Sequential(copy.deepcopy(LAYERS[name]), nn.Linear(64, 8))
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.9, compress="int8")
    x = torch.randn(32, 64) * 2
    x[:, 3] = -1e4
    with dropit.CacheMeter(ours) as meter:
        y = ours(x.requires_grad_())
    assert meter.total_bytes == 2048 + 2 * 64
    y.sum().backward()
    output = plain[0](x.detach())
    assert (ours[1].weight.grad - output.sum(0)).abs().max() < 32 / 254


@pytest.mark.parametrize("compress", ["int16", "int8"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_an_output_may_be_changed_in_place_where_it_is_not_what_is_kept(name, compress):
    x = torch.randn(8, 32, requires_grad=True)
    y = quantized(LAYERS[name], compress)(x).mul_(2)
    y.sum().backward()
    _, exact = gradient(LAYERS[name], x, torch.full_like(x, 2))
    torch.testing.assert_close(x.grad, exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_an_output_that_is_kept_as_it_is_may_not_be_changed(name):
    """In bfloat16, of 16 bits: PyTorch notices as well."""
    x = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    ours = quantized(LAYERS[name], "int16")
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    assert meter.total_bytes == 2 * 8 * 32
    y = ours(x * 1).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_and_by_torch_func(name):
    torch._dynamo.reset()
    ours, x = quantized(LAYERS[name], "int8"), torch.randn(5, 32)
    x[0, 3] = -1e4
    expected = gradient(ours, x, torch.ones_like(x))[1]
    got = torch.func.grad(lambda x: ours(x * 1).sum())(x)
    torch.testing.assert_close(got, expected)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x, torch.ones_like(x))[1], expected)


@pytest.mark.parametrize(("compress", "nbytes"), [("int16", 2002), ("int8", 1001), ("int4", 501), ("int2", 251)])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_held(name, compress, nbytes):
    ours = quantized(LAYERS[name], compress)
    x = torch.randn(7, 11, 13, requires_grad=True)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x * 1)
    sides = 126 if "hardswish" in name and compress == "int16" else 0
    assert meter.total_bytes == nbytes + 2 * 32 + sides  # and 32 scales
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
    rounded = torch.stack([ops.unpack(ours.saver.quantize(x)) for _ in range(2000)])
    torch.testing.assert_close(rounded.mean(dim=0), x, rtol=0, atol=0.01)
    ours = make(1)
    grads = [gradient(ours, x, torch.ones(100))[1] for _ in range(2)]
    assert not torch.equal(*grads)
    again = make(1)
    before = torch.get_rng_state()
    assert torch.equal(gradient(again, x, torch.ones(100))[1], grads[0])
    assert torch.equal(torch.get_rng_state(), before)
