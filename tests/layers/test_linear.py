import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import dropit
from dropit.saved import Recipe
from dropit.strategies import FastMinK, MinK
from tests.layers.cases import gradients, masked


def layer(*sizes, strategy="fastmink", gamma=0.9, dtype=torch.float32, **options):
    return dropit.to_dropit(nn.Linear(*sizes, dtype=dtype, **options), strategy, gamma)


INPUTS = {
    "2-D": lambda: torch.randn(32, 24, dtype=torch.float64),
    "1-D": lambda: torch.randn(24, dtype=torch.float64),
    "3-D": lambda: torch.randn(4, 7, 24, dtype=torch.float64),
    "4-D": lambda: torch.randn(2, 3, 5, 24, dtype=torch.float64),
    "transposed": lambda: torch.randn(24, 7, 4, dtype=torch.float64).transpose(0, 2),
    "sliced": lambda: torch.randn(16, 48, dtype=torch.float64)[::2, ::2],
    "expanded": lambda: torch.randn(1, 24, dtype=torch.float64).expand(16, 24),
    "one row": lambda: torch.randn(1, 24, dtype=torch.float64),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("strategy", ["fastmink", "mink_c"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients_are_those_of_the_masked_input(make, bias, strategy):
    linear = layer(24, 10, strategy=strategy, bias=bias, dtype=torch.float64)
    x = make().requires_grad_()
    y = linear(x)
    assert torch.equal(y, F.linear(x, linear.weight, linear.bias))

    grad_output = torch.randn(*y.shape, 2, dtype=torch.float64)[..., 0]  # not contiguous
    grad_input, grad_weight, *rest = gradients(y, grad_output, [x, *linear.parameters()])
    rows = grad_output.reshape(-1, 10)
    by_hand = torch.einsum("so,si->oi", rows, masked(linear.saver, x).reshape(-1, 24))
    torch.testing.assert_close(grad_weight, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_input, torch.einsum("...o,oi->...i", grad_output, linear.weight))
    for grad_bias in rest:
        torch.testing.assert_close(grad_bias, rows.sum(0), rtol=1e-12, atol=1e-12)


def test_nothing_is_computed_of_channels_that_were_dropped(monkeypatch):
    linear = layer(40, 10, strategy="mink_c")
    monkeypatch.setattr(Recipe, "restore", None)  # which would give a dense input
    linear(torch.randn(8, 40)).sum().backward()
    assert linear.weight.grad.any(0).sum() == 4


@pytest.mark.parametrize("shape", [(24,), (5, 24), (64, 24), (3, 17, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gamma_zero_is_ordinary_training_bit_for_bit(shape, dtype):
    linear = layer(24, 10, gamma=0.0, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(*shape[:-1], 10, dtype=dtype)
    ours = gradients(linear(x), grad_output, [x, *linear.parameters()])
    plain = gradients(F.linear(x, linear.weight, linear.bias), grad_output, [x, *linear.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_gradcheck_at_gamma_zero():
    linear = layer(6, 4, gamma=0.0, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, x)


def test_backward_twice_gives_the_same_gradients():
    linear = layer(24, 10)
    y = linear(torch.randn(8, 24))
    grad_output = torch.randn(8, 10)
    assert torch.equal(*(gradients(y, grad_output, [linear.weight])[0] for _ in range(2)))


def test_only_values_and_positions_are_saved_through_autograds_hooks():
    linear = layer(24, 10)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(torch.randn(80, 24))
    del y
    packed = linear.strategy.pack(torch.randn(80, 24))
    assert sum(t.nbytes for t in saved) == packed.nbytes == 192 * 4 + 192 + 2 * 8  # values, offsets, counts of 8 blocks


@pytest.mark.parametrize("grad_input", [True, False])
@pytest.mark.parametrize("grad_weight", [True, False])
@pytest.mark.parametrize("grad_bias", [True, False])
def test_only_the_wanted_gradients_are_computed_and_saved_for(grad_input, grad_weight, grad_bias):
    linear = layer(24, 10)
    x = torch.randn(80, 24, requires_grad=grad_input)
    linear.weight.requires_grad_(grad_weight)
    linear.bias.requires_grad_(grad_bias)
    with dropit.CacheMeter(linear) as ours:
        y = linear(x)
    with dropit.CacheMeter(linear) as plain:
        reference = F.linear(x, linear.weight, linear.bias)
    assert ours.total_bytes <= plain.total_bytes
    assert y.requires_grad == reference.requires_grad
    if y.requires_grad:
        y.sum().backward()
    for tensor, wanted in ((x, grad_input), (linear.weight, grad_weight), (linear.bias, grad_bias)):
        assert (tensor.grad is not None) == wanted


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "frozen"])
def test_nothing_is_packed_where_no_weight_gradient_is_wanted(mode, monkeypatch):
    monkeypatch.setattr(FastMinK, "select", None)  # any packing would raise
    linear = layer(24, 10)
    x = torch.randn(80, 24, requires_grad=mode == "frozen")
    expected = F.linear(x, linear.weight, linear.bias)
    if mode == "eval":
        linear.eval()
    if mode == "frozen":
        linear.weight.requires_grad_(False)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_plain_pytorchs_output_and_keeps_the_narrow_input(dtype):
    linear = layer(64, 32)
    plain = nn.Linear(64, 32)
    plain.load_state_dict(linear.state_dict())
    x = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", dtype):
        with dropit.CacheMeter(linear) as meter:
            ours = linear(x)
        expected = plain(x)
    assert ours.dtype == expected.dtype == dtype
    assert torch.equal(ours, expected)
    kept = linear.strategy.pack(x.to(dtype))
    assert meter.total_bytes == kept.nbytes + linear.weight.numel() * 2
    ours.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    by_hand = torch.ones(32, 40) @ masked(linear.saver, x.to(dtype)).float()
    torch.testing.assert_close(linear.weight.grad, by_hand, rtol=2e-2, atol=2e-2)


def test_a_packed_input_may_be_overwritten_and_a_dense_one_may_not():
    for gamma, context in ((0.9, None), (0.0, pytest.raises(RuntimeError, match="modified by an inplace operation"))):
        linear = layer(24, 10, gamma=gamma)
        x = torch.randn(80, 24)
        (expected,) = gradients(linear(x), torch.ones(80, 10), [linear.weight])
        y = linear(x)
        x.zero_()
        if context is None:
            assert torch.equal(gradients(y, torch.ones(80, 10), [linear.weight])[0], expected)
        else:
            with context:
                y.sum().backward()


def test_repr_says_what_is_done():
    assert "in_features=24, out_features=10, bias=True, strategy=MinK(gamma=0.9, per_sample=False)" in repr(
        layer(24, 10, strategy="mink")
    )
    assert layer(24, 10, strategy="mink").strategy == MinK(0.9)


@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_complex_inputs_are_left_to_pytorch(compress):
    plain = nn.Linear(24, 10, dtype=torch.complex64)
    ours = dropit.to_dropit(copy.deepcopy(plain), compress=compress)
    x = torch.randn(8, 24, dtype=torch.complex64, requires_grad=True)
    for model in (plain, ours):
        model(x).abs().square().sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (0,)], ids=str)
@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_inputs_without_elements(shape, compress):
    plain = nn.Linear(shape[-1], 10)
    ours = dropit.to_dropit(copy.deepcopy(plain), compress=compress)
    for model in (plain, ours):
        model(torch.ones(shape, requires_grad=True)).sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)


def test_outputs_without_elements():
    ours = dropit.to_dropit(nn.Linear(300, 0))
    x = torch.randn(64, 300, requires_grad=True)
    ours(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert ours.weight.grad.shape == (0, 300)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.readings = 0

    def forward(self, weight):
        self.readings += 1
        return weight * 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_parametrized_weight_is_read_once(training, frozen):
    linear = nn.Linear(24, 10)
    parametrize.register_parametrization(linear, "weight", counted := Counted())
    ours = dropit.to_dropit(nn.Sequential(linear, nn.Linear(10, 10))).train(training)
    linear.parametrizations.weight.original.requires_grad_(not frozen)
    before = counted.readings
    ours(torch.randn(8, 24))
    assert counted.readings == before + 1


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
def test_at_gamma_zero_gradients_are_bit_for_bit_in_any_layout(order):
    plain = nn.Linear(24, 10)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0)
    sizes = (70, 50, 24)
    x = torch.randn([sizes[dim] for dim in order]).permute([order.index(dim) for dim in range(3)])
    grad_output = torch.randn(70, 50, 10)
    for model in (plain, ours):
        model(x).backward(grad_output)
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    assert torch.equal(ours.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("strategy", ["fastmink", "mink", "mink_c", "random"])
@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_a_negative_view_keeps_its_sign(strategy, compress):
    x = torch.randn(40, 24)
    grads = []
    for each in (-x, torch._neg_view(x)):
        linear = dropit.to_dropit(nn.Linear(24, 10), strategy, 0.5, compress=compress)
        linear(each).sum().backward()
        grads.append(linear.weight.grad)
    if strategy != "random":
        assert torch.equal(*grads)
    assert (grads[1] @ x.sum(0) < 0).all()
