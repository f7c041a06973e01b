"""What the fuzzer found, each in a few lines. Plain PyTorch is the measure of all."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropit

LOSSLESS = {"gamma": 0.0, "compress": "lossless"}
INT16 = {"gamma": 0.0, "compress": "int16"}


def pair(module, **options):
    """The module, and a copy that is converted."""
    return module, dropit.to_dropit(copy.deepcopy(module), **options)


def test_bias_gradient_of_a_transposed_input_is_bit_equal():
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(3, 4, 5, 6).transpose(-1, -2).requires_grad_()
        plain, ours = pair(nn.Linear(5, 4), **LOSSLESS)
        grad = torch.randn(1, 4, 6, 4).expand(3, -1, -1, -1)
        for module in (plain, ours):
            module(x).backward(grad)
        assert torch.equal(plain.bias.grad, ours.bias.grad)


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Conv1d(4, 4, 3)], ids=["linear", "conv"])
def test_autocast_casts_a_weight_once_for_two_calls(module):
    plain, ours = pair(module, **LOSSLESS)
    inputs = torch.randn(2, 3, 4, 8)
    for each in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [each(x) for x in inputs]
        (outputs[0].sum() + outputs[1].square().sum()).backward()
    assert torch.equal(plain.weight.grad, ours.weight.grad)
    assert torch.equal(plain.bias.grad, ours.bias.grad)


def test_two_calls_under_autocast_hold_no_more_than_plain():
    held = []
    for module in pair(nn.Linear(64, 64, bias=False), **LOSSLESS):
        first, second = torch.randn(2, 2, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), dropit.CacheMeter(module) as meter:
            outputs = module(first), module(second)
        held.append(meter.total_bytes)
        del outputs
    assert held[1] <= held[0]


def test_attention_input_may_be_overwritten_where_plain_keeps_a_copy():
    plain, ours = pair(nn.MultiheadAttention(8, 2, batch_first=True), **LOSSLESS)
    grads = []
    for module in (plain, ours):
        x = torch.linspace(-1, 1, 120).view(3, 5, 8)
        y = module(x, x, x)[0]
        x.add_(1)
        y.square().sum().backward()
        grads.append(module.in_proj_weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("hooks", [True, False], ids=["in a CacheMeter", "outside"])
def test_transposed_input_may_be_overwritten_where_plain_keeps_a_copy(hooks):
    grads = []
    for module in pair(nn.Linear(5, 4), **LOSSLESS):
        x = torch.linspace(-1, 1, 60).view(3, 5, 4)
        if hooks:
            with dropit.CacheMeter(module):
                y = module(x.transpose(1, 2))
        else:
            y = module(x.transpose(1, 2))
        x.add_(1)
        y.square().sum().backward()
        grads.append(module.weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.LayerNorm(4),
        nn.GELU(),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_no_gradient_stays_none_where_plain_has_none(layer):
    last = nn.Linear(4, 4)

    def cut(x):
        return last(x.detach())

    for module in pair(nn.Sequential(nn.Linear(4, 4), layer), **INT16):
        checkpoint(cut, module(torch.randn(2, 4)), use_reentrant=True).sum().backward()
        assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == []


@pytest.mark.parametrize(
    ("dtype", "frozen"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16", "frozen projection"]
)
def test_output_of_attention_with_one_head_is_bit_equal(dtype, frozen):
    attention = nn.MultiheadAttention(7, 1, batch_first=True, dtype=dtype)
    nn.init.normal_(attention.out_proj.bias)
    attention.out_proj.requires_grad_(not frozen)
    plain, ours = pair(attention, **LOSSLESS)
    x = torch.randn(3, 5, 7, dtype=dtype)
    for need_weights in (True, False):
        expected = plain(x, x, x, need_weights=need_weights)[0]
        assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], expected)


def laid_out(x, order):
    """``x``, with its dimensions in memory in that order."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (1, 2, 3, 1), (2, 2, 3, 1), (3, 3, 1, 3), (2, 3, 4, 2)])
def test_batch_norm_gradients_are_right_whatever_the_layouts(shape):
    """PyTorch has a fifth of these wrong on a CPU (torch 2.14): the sum over the samples is the truth."""
    orders = list(itertools.permutations(range(4)))
    x, grad = torch.randn(shape), torch.randn(shape)
    _, ours = pair(nn.Sequential(nn.BatchNorm2d(shape[1]), nn.Conv2d(shape[1], 1, 1)), **INT16)
    for order, order_of_grad in itertools.product(orders, orders):
        ours.zero_grad()
        ours[0](laid_out(x, order).requires_grad_()).backward(laid_out(grad, order_of_grad))
        torch.testing.assert_close(ours[0].bias.grad, grad.sum((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_autocast_casts_the_bias_of_a_frozen_convolution_once_for_two_calls():
    conv = nn.Conv2d(3, 1, 3)
    conv.weight.requires_grad_(False)
    biases = []
    grads = [torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16) for value in (-4.46875, 14.0)]
    for module in pair(nn.Sequential(conv, nn.Conv2d(1, 1, 1)), **LOSSLESS):
        x = torch.ones(1, 3, 3, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [module[0](x) for _ in grads]
        torch.autograd.backward(outputs, grads)
        biases.append(module[0].bias.grad)
    assert torch.equal(biases[1], biases[0])


@pytest.mark.parametrize("compress", ["int16", "int8", "int4", "int2"])
def test_attention_with_dropout_takes_a_float_mask_under_autocast(compress):
    attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
    dropit.to_dropit(attention, gamma=0.0, compress=compress)
    x = torch.randn(2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x, x, x, attn_mask=torch.zeros(3, 3), need_weights=False)[0]
    y.float().square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_output_of_attention_without_a_batch_is_bit_equal(need_weights):
    plain, ours = pair(nn.MultiheadAttention(6, 2), **LOSSLESS)
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(2, 6)
        assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], plain(x, x, x, need_weights=need_weights)[0])


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.ReLU()], ids=lambda a: type(a).__name__)
def test_strides_of_an_activation_of_one_channels_last_sample_are_those_of_plain(activation):
    plain, ours = pair(nn.Sequential(activation, nn.Conv2d(4, 4, 1)), **INT16)
    x = torch.randn(1, 4, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert ours[0](x).stride() == plain[0](x).stride()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "in a meter"])
def test_a_layer_read_twice_in_a_checkpoint_stores_each_input_as_in_the_first_run(use_reentrant, hooked):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    dropit.to_dropit(model, compress="int8")
    x = torch.randn(64, 32)

    def twice(x):
        return model[0](model(x))  # what nothing is offered for, then what the normalization offers

    def gradients(run):
        inputs = [x.clone().requires_grad_(), *model.parameters()]
        for each in inputs:
            each.grad = None
        with dropit.CacheMeter(model) if hooked else contextlib.nullcontext():
            y = run(inputs[0])
        y.square().sum().backward()
        return [each.grad for each in inputs]

    got = gradients(lambda leaf: checkpoint(twice, leaf, use_reentrant=use_reentrant, preserve_rng_state=False))
    for ours, expected in zip(got, gradients(twice), strict=True):
        assert torch.equal(ours, expected)


def test_autocast_casts_the_input_of_an_even_kernel_once_for_two_calls():
    plain, ours = pair(nn.Conv2d(2, 2, 2, padding="same"), **LOSSLESS)
    grads = torch.randn(2, 3, 2, 5, 5).bfloat16()
    found = []
    for module in (plain, ours):
        x = torch.ones(3, 2, 5, 5, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [module(x) for _ in grads]
        found.append(torch.autograd.grad(outputs, x, list(grads))[0])
    assert torch.equal(*found)
