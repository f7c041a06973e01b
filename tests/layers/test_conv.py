import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropit
from dropit.saved import Recipe
from tests.layers.cases import gradients, masked


def pair(*sizes, gamma=0.9, dtype=torch.float64, strategy="fastmink", kind=nn.Conv2d, **options):
    """A DropIT convolution and the plain one with the same parameters."""
    plain = kind(*sizes, dtype=dtype, **options)
    ours = kind(*sizes, dtype=dtype, **options)
    ours.load_state_dict(plain.state_dict())
    return dropit.to_dropit(ours, strategy, gamma), plain


GEOMETRIES = [
    {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    for stride, padding, dilation, groups, bias in itertools.product(
        [1, (2, 1)], [0, (1, 2)], [1, 2], [1, 4], [True, False]
    )
]


def check_against_masked(ours, plain, x):
    """grad_weight from the masked input, by plain PyTorch's own convolution; everything else exact."""
    x = x.detach().requires_grad_()
    y = ours(x)
    grad_output = torch.randn_like(y).transpose(-1, -2).contiguous().transpose(-1, -2)  # not contiguous
    exact = plain(x)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    grad_input, _, *grad_bias = gradients(y, grad_output, [x, *ours.parameters()])
    exact_input, _, *exact_bias = gradients(exact, grad_output, [x, *plain.parameters()])
    torch.testing.assert_close(grad_input, exact_input, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_bias, exact_bias, rtol=1e-12, atol=1e-12)

    (ours_weight,) = gradients(y, grad_output, [ours.weight])
    (by_hand,) = gradients(plain(masked(ours.saver, x, channel_dim=-3)), grad_output, [plain.weight])
    torch.testing.assert_close(ours_weight, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", ["fastmink", "mink_c"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(str(v) for v in g.values()))
def test_gradients_are_those_of_the_masked_input(geometry, strategy):
    convs = pair(8, 12, 3, gamma=0.7, strategy=strategy, **geometry)
    check_against_masked(*convs, torch.randn(3, 8, 11, 9, dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 4])
def test_where_whole_channels_are_dropped_a_transposed_convolution_computes_as_much(groups):
    convs = pair(8, 12, 3, gamma=0.7, strategy="mink_c", kind=nn.ConvTranspose2d, groups=groups, stride=2)
    check_against_masked(*convs, torch.randn(3, 8, 11, 9, dtype=torch.float64))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_nothing_is_computed_of_channels_that_were_dropped(kind, monkeypatch):
    ours, _ = pair(16, 12, 3, strategy="mink_c", kind=kind)
    monkeypatch.setattr(Recipe, "restore", None)  # which would give a dense input
    ours.to(memory_format=torch.channels_last)(torch.randn(3, 16, 11, 9, dtype=torch.float64)).sum().backward()
    channels = ours.weight.grad.transpose(0, 1) if kind is nn.Conv2d else ours.weight.grad
    assert channels.flatten(1).any(1).sum() == 2
    assert ours.weight.grad.stride() == ours.weight.stride()


@pytest.mark.parametrize("strategy", ["fastmink", "mink_c"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 8, 11, 9, dtype=torch.float64).to(memory_format=torch.channels_last),
        torch.randn(3, 8, 9, 11, dtype=torch.float64).transpose(2, 3),
        torch.randn(3, 16, 22, 9, dtype=torch.float64)[:, ::2, ::2],
        torch.randn(1, 8, 11, 9, dtype=torch.float64).expand(3, 8, 11, 9),
        torch.randn(8, 11, 9, dtype=torch.float64),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded", "unbatched"],
)
def test_any_layout(x, strategy):
    check_against_masked(*pair(8, 12, 3, padding=1, strategy=strategy), x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [2, 3, (4, 1)])
def test_padding_same(kernel):
    check_against_masked_after_padding("zeros", kernel, "same")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    check_against_masked_after_padding(mode, 3, (1, 2))


def check_against_masked_after_padding(mode, kernel, padding):
    """Where padding comes first, it is the padded input that is masked."""
    ours, plain = pair(8, 12, kernel, padding=padding, padding_mode=mode)
    x = torch.randn(3, 8, 11, 9, dtype=torch.float64, requires_grad=True)
    y, exact = ours(x), plain(x)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    grad_output = torch.randn_like(y)
    grad_input, ours_weight = gradients(y, grad_output, [x, ours.weight])
    torch.testing.assert_close(grad_input, gradients(exact, grad_output, [x])[0], rtol=1e-12, atol=1e-12)

    seen, rest = ours._pad(x.detach(), ours.weight)
    by_hand = F.conv2d(masked(ours.saver, seen), plain.weight, padding=rest)
    torch.testing.assert_close(ours_weight, gradients(by_hand, grad_output, [plain.weight])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gamma_zero_is_ordinary_training(dtype):
    ours, plain = pair(8, 12, 3, gamma=0.0, padding=1, dtype=dtype)
    x = torch.randn(3, 8, 11, 9, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(3, 12, 11, 9, dtype=dtype)
    got = gradients(ours(x), grad_output, [x, *ours.parameters()])
    exact = gradients(plain(x), grad_output, [x, *plain.parameters()])
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)


def test_gradcheck_at_gamma_zero():
    ours, _ = pair(2, 3, 3, gamma=0.0, padding=1)
    assert torch.autograd.gradcheck(ours, torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True))


def test_the_masked_input_stays_channels_last_for_the_backward_kernel():
    ours, _ = pair(8, 12, 3, padding=1, dtype=torch.float32)
    ours = ours.to(memory_format=torch.channels_last)
    x = torch.randn(3, 8, 11, 9).to(memory_format=torch.channels_last).requires_grad_()
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights_hold_no_more_than_plain():
    ours, plain = pair(8, 12, 3, dtype=torch.float32)
    x = torch.randn(3, 8, 11, 9, requires_grad=True)
    for module in (ours, plain):
        module.weight.requires_grad_(False)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x)
    with dropit.CacheMeter(plain) as reference:
        exact = plain(x)
    assert torch.equal(y, exact)
    assert meter.total_bytes <= reference.total_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_plain_pytorchs_output(dtype):
    ours, plain = pair(8, 12, 3, dtype=torch.float32)
    x = torch.randn(3, 8, 11, 9, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, exact = ours(x), plain(x)
    assert y.dtype == dtype
    assert torch.equal(y, exact)
    y.float().sum().backward()
    assert ours.weight.grad.dtype == x.grad.dtype == torch.float32


def as_set_later(module, **later):
    for name, value in later.items():
        setattr(module, name, value)
    return module


LATER = {
    "padding": (nn.Conv2d(8, 12, 3), {"padding": (2, 1)}),
    "one number": (nn.Conv2d(8, 12, 3), {"padding": 2, "dilation": 2, "stride": 2}),
    "dilation": (nn.Conv2d(8, 12, 3, padding=1), {"dilation": (2, 2), "padding": (2, 2)}),
    "groups": (nn.Conv2d(8, 8, 3, groups=8), {"padding": (1, 1), "stride": (2, 2)}),
    "same": (nn.Conv2d(8, 12, 3, padding="same"), {"dilation": (3, 2)}),
    "same, even": (nn.Conv2d(8, 12, (2, 4), padding="same"), {"dilation": (3, 2)}),
    "valid": (nn.Conv2d(8, 12, 3, padding=1), {"padding": "valid"}),
    "to same": (nn.Conv2d(8, 12, 3), {"padding": "same"}),
    "reflect": (nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), {"padding": (2, 2), "dilation": (2, 2)}),
    "another mode": (nn.Conv2d(8, 12, 3, padding=1), {"padding_mode": "circular"}),
    "transposed": (nn.ConvTranspose2d(8, 12, 3), {"padding": (1, 1), "stride": (2, 2), "dilation": (2, 2)}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("name", LATER)
def test_what_is_set_after_construction_is_read_at_call_time(name, gamma):
    plain, later = LATER[name]
    plain = as_set_later(copy.deepcopy(plain), **later)
    ours = as_set_later(dropit.to_dropit(copy.deepcopy(LATER[name][0]), gamma=gamma), **later)
    x = torch.randn(3, 8, 11, 9, requires_grad=True)
    y, exact = ours(x), plain(x)
    assert torch.equal(y, exact)
    grad_output = torch.randn_like(y)
    (got,), (expected,) = gradients(y, grad_output, [x]), gradients(exact, grad_output, [x])
    assert torch.equal(got, expected)


def test_a_stride_set_later_is_pytorchs_error_where_padding_is_same():
    ours = as_set_later(dropit.to_dropit(nn.Conv2d(8, 12, 3, padding="same")), stride=(2, 2))
    with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
        ours(torch.randn(3, 8, 11, 9))


CONVOLUTIONS = {
    "conv": (nn.Conv2d(8, 12, 3), (3, 8, 11, 9)),
    "conv, padding": (nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"), (3, 8, 11, 9)),
    "transposed": (nn.ConvTranspose1d(8, 12, 3), (3, 8, 11)),
}


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("wanted", ["training", "frozen", "evaluation", "no gradients", "complex"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_parametrized_weights_are_read_once(name, wanted):
    plain, shape = CONVOLUTIONS[name]
    dtype = torch.complex64 if wanted == "complex" else torch.float32
    plain = copy.deepcopy(plain).to(dtype)
    readings = []

    class Noted(nn.Module):
        def forward(self, value):
            readings.append(value)
            return value * 2

    ours = dropit.to_dropit(plain)
    for parameter in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(ours, parameter, Noted())
    ours.train(wanted != "evaluation").requires_grad_(wanted != "frozen")
    x = torch.randn(shape, dtype=dtype)
    readings.clear()
    with torch.set_grad_enabled(wanted != "no gradients"):
        ours(x)
    assert len(readings) == 2


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_complex_convolutions_are_pytorchs(name):
    plain, shape = CONVOLUTIONS[name]
    plain = copy.deepcopy(plain).to(torch.complex64)
    ours = dropit.to_dropit(copy.deepcopy(plain), compress="int8")
    x = torch.randn(shape, dtype=torch.complex64, requires_grad=True)
    results = []
    for module in (ours, plain):
        y = module(x)
        results += [y, *torch.autograd.grad(y.abs().sum(), [x, *module.parameters()])]
    assert all(map(torch.equal, results[:4], results[4:]))


@pytest.mark.parametrize("shape", [(9,), (11, 9), (3, 8, 11, 9, 2), (3, 7, 11, 9)], ids=str)
def test_inputs_that_do_not_fit_are_pytorchs_error(shape):
    for plain in (nn.Conv2d(8, 12, 3), nn.ConvTranspose2d(8, 12, 3)):
        with pytest.raises(RuntimeError) as expected:
            plain(torch.randn(shape))
        with pytest.raises(RuntimeError) as got:
            dropit.to_dropit(copy.deepcopy(plain))(torch.randn(shape))
        assert str(got.value) == str(expected.value)
