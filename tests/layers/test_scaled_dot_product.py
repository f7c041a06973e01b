import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropit
from dropit import ops
from dropit.layers import scaled_dot_product
from dropit.layers.scaled_dot_product import AttentionArguments as Arguments
from dropit.layers.scaled_dot_product import dropit_attention, dropit_scaled_dot_product
from dropit.policy import SavePolicy
from dropit.saver import Saver
from dropit.strategies import MinK


def saver(bits=8):
    return Saver(SavePolicy(MinK(0.9), bits=bits))


def tensors():
    """q, k, v of two samples, three heads, nine tokens; weight and bias of the projection."""
    sizes = [(2, 3, 9, 8)] * 3 + [(24, 24), (24,)]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def attention(q, k, v, weight, bias, mask=None, dropout=0.0, causal=False):
    """By PyTorch's functions: (L, N, E)."""
    context = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return F.linear(context.permute(2, 0, 1, 3).flatten(2), weight, bias)


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "bias": (torch.randn(2, 1, 9, 9, dtype=torch.float64), False),
}


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("by_formula", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_the_quantized_tensors(name, by_formula, bits, monkeypatch):
    mask, causal = MASKS[name]
    if by_formula:
        monkeypatch.setattr(scaled_dot_product, "is_traced", lambda: True)
    inputs = tensors()
    y = dropit_attention(*inputs, mask, Arguments(0.0, causal), saver(bits))
    assert torch.equal(y, attention(*inputs, mask, 0.0, causal))
    grad_output = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, grad_output)
    rounded = [ops.unpack(saver(bits).quantize(x)).requires_grad_() for x in inputs[:3]] + inputs[3:]
    exact = torch.autograd.grad(attention(*rounded, mask, 0.0, causal), rounded, grad_output)
    for ours, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


FORMS = {
    "causal": Arguments(is_causal=True),
    "scaled": Arguments(scale=0.3),
    "grouped queries": Arguments(enable_gqa=True),
}


@pytest.mark.parametrize("by_formula", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize("name", FORMS)
def test_attention_alone_takes_what_pytorchs_function_takes(name, by_formula, monkeypatch):
    if by_formula:
        monkeypatch.setattr(scaled_dot_product, "is_traced", lambda: True)
    arguments = FORMS[name]
    heads = 2 if arguments.enable_gqa else 4
    sizes = [(2, 4, 9, 8), (2, heads, 9, 8), (2, heads, 9, 8)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    y = dropit_scaled_dot_product(*inputs, None, arguments, saver())
    assert torch.equal(y, arguments.attend(*inputs, None))
    grad_output = torch.randn_like(y)
    rounded = [ops.unpack(saver().quantize(x)).requires_grad_() for x in inputs]
    exact = torch.autograd.grad(arguments.attend(*rounded, None), rounded, grad_output)
    for ours, expected in zip(torch.autograd.grad(y, inputs, grad_output), exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_mask_of_bools_hides_what_is_false():
    inputs = tensors()[:3]
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    grad_output = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    causal = dropit_scaled_dot_product(*inputs, None, Arguments(is_causal=True), saver())
    masked = dropit_scaled_dot_product(*inputs, mask, Arguments(), saver())
    got = torch.autograd.grad(masked, inputs, grad_output)
    for ours, expected in zip(got, torch.autograd.grad(causal, inputs, grad_output), strict=True):
        torch.testing.assert_close(ours, expected)


def test_dropout_is_drawn_again_the_same():
    inputs = tensors()
    torch.manual_seed(3)
    y = dropit_attention(*inputs, None, Arguments(0.4), saver())
    torch.manual_seed(3)
    exact_y = attention(*inputs, dropout=0.4)
    assert torch.equal(y, exact_y)
    grad_output = torch.randn_like(y)
    before = torch.get_rng_state()
    got = torch.autograd.grad(y, inputs, grad_output)
    assert torch.equal(torch.get_rng_state(), before)
    exact = torch.autograd.grad(exact_y, inputs, grad_output)
    for ours, expected in zip(got, exact, strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("compress", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
def test_a_layer_holds_its_packed_input_and_q_k_v_only(compress, bits):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.9, compress=compress)
    x = torch.randn(4, 32, 64, requires_grad=True)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x, x, x, need_weights=False)[0]
    n = x.numel()
    packed = ours.strategy.pack(x).nbytes
    assert meter.by_operator() == {"DropITAttention": 3 * (n * bits // 8 + n // 16), "DropITLinear": packed}
    exact = plain(x, x, x, need_weights=False)[0]
    assert torch.equal(y, exact)
    got, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, exact))
    assert (got - expected).norm() < (0.02 if bits == 8 else 0.3) * expected.norm()


def test_a_learned_bias_in_the_mask_keeps_its_gradient():
    layer = dropit.to_dropit(nn.MultiheadAttention(64, 4, batch_first=True), compress="int8")
    x = torch.randn(4, 32, 64)
    bias = torch.zeros(32, 32, requires_grad=True)
    layer(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
    assert bias.grad.abs().sum() > 0


def test_a_second_derivative_is_a_clear_error():
    inputs = tensors()
    y = dropit_attention(*inputs, None, Arguments(), saver())
    (grad,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [Arguments(0.4), Arguments(0.4, True), Arguments(0.2, scale=0.3, enable_gqa=True)],
    ids=str,
)
def test_dropouts_mask_is_the_forwards_whatever_the_form(arguments, dtype):
    heads = 2 if arguments.enable_gqa else 4
    inputs = [torch.randn(2, h, 9, 8, dtype=dtype, requires_grad=True) for h in (4, heads, heads)]
    torch.manual_seed(3)
    y = dropit_scaled_dot_product(*inputs, None, arguments, saver(16))
    torch.manual_seed(3)
    exact = arguments.attend(*inputs, None)
    assert torch.equal(y, exact)
    grad_output = torch.randn_like(y)
    torch.rand(5)  # somebody draws in between
    for ours, expected in zip(*(torch.autograd.grad(out, inputs, grad_output) for out in (y, exact)), strict=True):
        assert (ours - expected).norm() < (2e-2 if dtype is torch.bfloat16 else 1e-3) * expected.norm()


def test_dropouts_mask_is_the_forwards_with_stochastic_rounding():
    inputs = tensors()
    torch.manual_seed(3)
    stochastic = Saver(SavePolicy(MinK(0.9), bits=16, stochastic=True))
    y = dropit_attention(*inputs, None, Arguments(0.4), stochastic)
    torch.manual_seed(3)
    exact = attention(*inputs, dropout=0.4)
    assert torch.equal(y, exact)
    grad_output = torch.randn_like(y)
    for ours, expected in zip(*(torch.autograd.grad(out, inputs, grad_output) for out in (y, exact)), strict=True):
        assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_the_backward_pass_leaves_pytorchs_generator_to_other_threads(monkeypatch):
    """Set back and forth, it would give another thread numbers twice."""
    y = dropit_scaled_dot_product(*tensors()[:3], None, Arguments(0.4), saver())
    monkeypatch.setattr(torch, "set_rng_state", None)
    y.sum().backward()


HIDDEN = {
    "bool": torch.tensor([[False, False, False], [True, False, False], [True, True, False]]),
    "float": torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, -torch.inf], [0.0, 0.5, -torch.inf]]).double(),
}


@pytest.mark.parametrize("by_formula", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_row_that_a_mask_hides_whole_has_no_gradient(name, by_formula, monkeypatch):
    if by_formula:
        monkeypatch.setattr(scaled_dot_product, "is_traced", lambda: True)
    inputs = [torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y = dropit_scaled_dot_product(*inputs, HIDDEN[name], Arguments(), saver(16))
    grad_output = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, grad_output)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*inputs, HIDDEN[name]), inputs, grad_output)
    for ours, expected in zip(got, exact, strict=True):
        assert (ours - expected).norm() < 1e-3 * expected.norm()
