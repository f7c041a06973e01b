import copy

import pytest
import torch
from torch import nn

import dropit
from tests.layers.cases import masked

E, HEADS = 32, 4


def pair(gamma, dtype=torch.float64, **options):
    plain = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options)
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
    return dropit.to_dropit(copy.deepcopy(plain), gamma=gamma), plain


def inputs(kind, batch_first, options, dtype=torch.float64):
    """Query, key, value: one tensor ("self"), two ("cross") or three ("apart")."""
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)

    def one(length, width):
        x = torch.randn(length, 3, width, dtype=dtype)
        return (x.transpose(0, 1) if batch_first else x).requires_grad_()

    query = one(7, E)
    if kind == "self":
        return query, query, query
    key = one(9, kdim)
    return query, key, key if kind == "cross" else one(9, vdim)


def gradients(module, arguments, keywords):
    torch.manual_seed(1)
    output, weights = module(*arguments, **keywords)
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    leaves = [*{id(x): x for x in arguments}.values(), *module.parameters()]
    return output, weights, torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "dropout": {"dropout": 0.3},
}
CASES = [(name, kind) for name in OPTIONS for kind in ("self", "cross", "apart")] + [("other widths", "apart")]
OPTIONS["other widths"] = {"kdim": 24, "vdim": 40, "batch_first": True}


@pytest.mark.parametrize("masks", ["none", "padding", "causal", "bool", "all"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", ""])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_at_gamma_zero_it_is_pytorchs_bit_for_bit(name, kind, need_weights, masks):
    options = OPTIONS[name]
    ours, plain = pair(0.0, **options)
    arguments = inputs(kind, options.get("batch_first", False), options)
    length, source = 7, 7 if kind == "self" else 9
    keywords = {"need_weights": need_weights}
    if masks in {"padding", "all"}:
        keywords["key_padding_mask"] = torch.tensor([[False] * (source - n) + [True] * n for n in (0, 2, 3)])
    if masks in {"bool", "all"}:
        keywords["attn_mask"] = torch.rand(3 * HEADS, length, source) < 0.2
    if masks == "causal":
        keywords["attn_mask"] = torch.full((length, source), -float("inf"), dtype=torch.float64).triu(1)
        keywords["is_causal"] = kind == "self" and "bias" not in name and "both" not in name and "zero" not in name
    output, weights, grads = gradients(ours, arguments, keywords)
    exact, exact_weights, exact_grads = gradients(plain, arguments, keywords)
    assert torch.equal(output, exact)
    assert (weights is None) == (exact_weights is None) == (not need_weights)
    if need_weights:
        assert torch.equal(weights, exact_weights)
    for ours_grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours_grad, exact_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_and_each_heads_weights(batch_first):
    ours, plain = pair(0.0, batch_first=batch_first)
    x = torch.randn(7, E, dtype=torch.float64)
    padding = torch.tensor([False] * 5 + [True] * 2)
    for keywords in ({"key_padding_mask": padding}, {"average_attn_weights": False}, {"need_weights": False}):
        for got, exact in zip(ours(x, x, x, **keywords), plain(x, x, x, **keywords), strict=True):
            assert (got is None) == (exact is None)
            if got is not None:
                # Not to the bit: PyTorch projects an unbatched query, key and value apart even if they are one tensor.
                torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_grad_weight_is_that_of_the_masked_input():
    ours, plain = pair(0.9)
    x = torch.randn(7, 3, E, dtype=torch.float64, requires_grad=True)
    keywords = {"need_weights": False}
    output, _, grads = gradients(ours, (x, x, x), keywords)
    exact, _, exact_grads = gradients(plain, (x, x, x), keywords)
    assert torch.equal(output, exact)
    names = ["input", *(name for name, _ in plain.named_parameters())]
    by_name, exact_by_name = dict(zip(names, grads, strict=True)), dict(zip(names, exact_grads, strict=True))
    for name in ("input", "in_proj_bias", "out_proj.bias"):
        torch.testing.assert_close(by_name[name], exact_by_name[name], rtol=1e-12, atol=1e-12)
    # grad of in_proj's output, by hand: the exact one solves grad_weight = grad^T x for the true x.
    grad_projected = projected_gradient(plain, x)
    expected = grad_projected.T @ masked(ours.saver, x).reshape(-1, E)
    torch.testing.assert_close(by_name["in_proj_weight"], expected, rtol=1e-10, atol=1e-10)


def projected_gradient(plain, x):
    """The gradient that arrives at in_proj's output (7 x 3, 3 E), from a bias made one per position."""
    shift = torch.zeros(7 * 3, 3 * E, dtype=torch.float64, requires_grad=True)
    projected = x.detach().reshape(-1, E) @ plain.in_proj_weight.T + plain.in_proj_bias + shift
    q, k, v = (part.view(7, 3, HEADS, -1).permute(1, 2, 0, 3) for part in projected.chunk(3, dim=-1))
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(7, 3, E)
    output = plain.out_proj(context)
    grad_output = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad(output, shift, grad_output)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_it_holds_less_than_plain(batch_first):
    ours, plain = pair(0.9, dtype=torch.float32, batch_first=batch_first)
    x = torch.randn(16, 16, E)
    held = []
    for module in (plain, ours):
        with dropit.CacheMeter(module) as meter:
            y = module(x, x, x, need_weights=False)[0]
        held.append(meter.total_bytes)
        del y
    assert held[1] < held[0]


def test_evaluation_takes_pytorchs_fast_path():
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True).eval()
    x = torch.randn(3, 7, E)
    with torch.no_grad():
        expected = layer(x)
        dropit.to_dropit(layer)
        calls = []
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(layer(x), expected)


def test_frozen_attention_keeps_nothing_of_ours(monkeypatch):
    ours, plain = pair(0.9)
    monkeypatch.setattr(type(ours.strategy), "select", None)  # any packing would raise
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(7, 3, E, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ours(x, x, x)[0], plain(x, x, x)[0])


def test_causal_without_a_mask_is_pytorchs_error():
    ours, _ = pair(0.9)
    x = torch.randn(7, 3, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_a_batch_of_no_samples(compress, need_weights):
    plain = nn.MultiheadAttention(E, 2, batch_first=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), compress=compress)
    results = []
    for layer in (plain, ours):
        x = torch.randn(0, 5, E, requires_grad=True)
        y = layer(x, x, x, need_weights=need_weights)[0]
        y.sum().backward()
        results.append((y.shape, layer.in_proj_weight.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_at_gamma_zero_learned_biases_have_plains_gradients_under_autocast():
    plain = nn.MultiheadAttention(E, 2, add_bias_kv=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0)
    quantized = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    x = torch.randn(5, 3, E)
    for layer in (plain, ours, quantized):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, x, x, need_weights=False)[0]
        y.float().square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours.get_parameter(name).grad, parameter.grad)
        off = quantized.get_parameter(name).grad - parameter.grad
        assert off.norm() < 0.05 * max(parameter.grad.norm(), plain.out_proj.weight.grad.norm())


REFUSED = {
    "a mask for each sample": {"attn_mask": torch.zeros(3, 6, 6, dtype=torch.bool)},
    "a mask of one row": {"attn_mask": torch.zeros(1, 6)},
    "a mask of one column": {"attn_mask": torch.zeros(6, 1)},
    "a mask of whole numbers": {"attn_mask": torch.zeros(6, 6, dtype=torch.int64)},
    "padding of one sample": {"key_padding_mask": torch.zeros(1, 6, dtype=torch.bool)},
    "one sample's key": {"key": torch.randn(1, 6, E), "value": torch.randn(1, 6, E)},
    "values of another length": {"value": torch.randn(3, 4, E)},
    "keys of another width": {"key": torch.randn(3, 6, E // 2)},
    "four dimensions": {"query": torch.randn(2, 3, 6, E)},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_pytorch_refuses_is_refused_in_its_words(name, need_weights):
    ours, plain = pair(0.9, torch.float32, batch_first=True)
    x = torch.randn(3, 6, E)
    given = {"query": x, "key": x, "value": x, "need_weights": need_weights} | REFUSED[name]
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        plain(**given)
    with pytest.raises(expected.type) as raised:
        ours(**given)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("need_weights", [True, False])
def test_all_dropped_out_has_gradients_of_zeros(need_weights):
    plain = nn.MultiheadAttention(E, HEADS, dropout=1.0, batch_first=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    x = torch.randn(3, 6, E)
    for module in (plain, ours):
        module(x, x, x, need_weights=need_weights)[0].sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
