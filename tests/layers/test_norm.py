import copy

import pytest
import torch
from torch import nn

import dropit
from dropit import ops

# Of each layer: itself, the shape of its input, and the dimensions it takes its mean over.
LAYERS = {
    "batch 1d": (nn.BatchNorm1d(6), (40, 6), [0]),
    "batch 1d, length": (nn.BatchNorm1d(6, momentum=None), (4, 6, 30), [0, 2]),
    "batch 2d": (nn.BatchNorm2d(6), (4, 6, 7, 5), [0, 2, 3]),
    "batch 2d, no weight": (nn.BatchNorm2d(6, affine=False), (4, 6, 7, 5), [0, 2, 3]),
    "batch 2d, no running": (nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 7, 5), [0, 2, 3]),
    "batch 3d": (nn.BatchNorm3d(3), (2, 3, 4, 5, 6), [0, 2, 3, 4]),
    "layer": (nn.LayerNorm(48), (5, 9, 48), [2]),
    "layer, two dimensions": (nn.LayerNorm((4, 12)), (9, 4, 12), [1, 2]),
    "layer, no bias": (nn.LayerNorm(48, bias=False), (5, 48), [1]),
    "layer, no weight": (nn.LayerNorm(48, elementwise_affine=False), (48,), [0]),
    "group": (nn.GroupNorm(3, 12), (4, 12, 5, 6), None),
    "group, no space": (nn.GroupNorm(2, 80, affine=False), (4, 80), None),
    "rms": (nn.RMSNorm(48), (5, 9, 48), [2]),
    "rms, eps": (nn.RMSNorm((4, 12), eps=0.1), (9, 4, 12), [1, 2]),
}


def pair(name, compress, dtype=torch.float64):
    """The layer quantized and plain, in a model that also has a layer to convert."""
    torch.manual_seed(0)
    plain, shape, dims = LAYERS[name]
    plain = copy.deepcopy(plain).to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 1.0)
    ours = dropit.to_dropit(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(plain)]), compress=compress)[1]
    return ours, plain, torch.randn(shape, dtype=dtype) * 3 + 2, dims


def gradients(module, x, grad_output):
    x = x.detach().requires_grad_()
    y = module(x)
    return y, torch.autograd.grad(y, [x, *module.parameters()], grad_output)


def stored(ours, normalized):
    """The normalized input as the layer's backward pass sees it."""
    return ops.unpack(ours.saver.quantize(normalized))


def by_hand(ours, x, grad_output, dims):
    """grad_input by the formula, from the quantized normalized input."""
    if dims is None:  # groups of channels
        x, grad = (t.view(x.shape[0], ours.num_groups, -1) for t in (x, grad_output))
        weight = 1 if ours.weight is None else ours.weight.view(-1, *[1] * (grad_output.dim() - 2))
        grad = (grad_output * weight).view(x.shape)
        dims = [2]
    elif ours.weight is None:
        grad = grad_output
    elif isinstance(ours, nn.modules.batchnorm._BatchNorm):
        grad = grad_output * ours.weight.view(-1, *[1] * (x.dim() - 2))
    else:
        grad = grad_output * ours.weight
    centred = 0 if isinstance(ours, nn.RMSNorm) else 1
    mean = x.mean(dim=dims, keepdim=True) * centred
    eps = torch.finfo(x.dtype).eps if ours.eps is None else ours.eps
    rstd = ((x - mean).square().mean(dim=dims, keepdim=True) + eps).rsqrt()
    normalized = stored(ours, ((x - mean) * rstd).view(grad_output.shape)).view(x.shape)
    inner = grad - grad.mean(dim=dims, keepdim=True) * centred
    return rstd * (inner - normalized * (grad * normalized).mean(dim=dims, keepdim=True))


@pytest.mark.parametrize("compress", ["int16", "int8", "int4", "int2"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_exact_and_the_gradient_is_the_formulas(name, compress):
    ours, plain, x, dims = pair(name, compress)
    grad_output = torch.randn_like(x)
    y, grads = gradients(ours, x, grad_output)
    exact, exact_grads = gradients(plain, x, grad_output)
    assert torch.equal(y, exact)
    for buffer, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    torch.testing.assert_close(grads[0].view(-1), by_hand(ours, x, grad_output, dims).view(-1), rtol=1e-6, atol=1e-6)
    if getattr(plain, "bias", None) is not None:
        torch.testing.assert_close(grads[-1], exact_grads[-1], rtol=1e-12, atol=1e-12)
    for got, expected in zip(grads, exact_grads, strict=True):
        error = (got - expected).norm() / expected.norm()
        assert error < {"int16": 0.02, "int8": 0.02, "int4": 0.25, "int2": 0.8}[compress]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("compress", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_what_is_held(name, compress, bits, dtype, memory_format):
    ours, plain, x, _ = pair(name, compress, dtype)
    x = x.to(memory_format=memory_format) if x.dim() == 4 else x
    with dropit.CacheMeter(ours) as meter:
        y = ours(x.requires_grad_())
    exact = plain(x)
    assert torch.equal(y, exact)
    assert y.stride() == exact.stride()
    n = x.numel()
    statistics = {"batch 2d": 6, "layer": 45, "group": 12, "rms": 45}[name]
    width = 2 if dtype is torch.bfloat16 and name == "batch 2d" else 4
    assert (
        meter.total_bytes == -(-n * bits // 8) + (2 * -(-n // 32) if bits > 2 else 4 * -(-n // 64)) + width * statistics
    )
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_only_wanted_gradients(name):
    ours, plain, x, _ = pair(name, "int8")
    grad_output = torch.randn_like(x)
    for module in (ours, plain):
        module.weight.requires_grad_(False)
    (got,) = torch.autograd.grad(ours(x.requires_grad_()), x, grad_output)
    (expected,) = torch.autograd.grad(plain(x), x, grad_output)
    assert (got - expected).norm() < 0.01 * expected.norm()
    for module in (ours, plain):
        module.weight.requires_grad_(True)
    x = x.detach()
    got = torch.autograd.grad(ours(x), ours.weight, grad_output)[0]
    expected = torch.autograd.grad(plain(x), plain.weight, grad_output)[0]
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_a_second_derivative_is_a_clear_error(name):
    ours, _, x, _ = pair(name, "int8")
    (grad,) = torch.autograd.grad(ours(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_evaluation_and_frozen_layers_hold_nothing_of_ours():
    ours, plain, x, _ = pair("batch 2d", "int8")
    for module in (ours, plain):
        module.running_mean.fill_(0.5)
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    ours.train()
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    with dropit.CacheMeter(ours) as meter:
        y = ours(x)
    assert meter.total_bytes == 0
    assert not y.requires_grad


def test_one_value_a_channel_is_pytorchs_error():
    ours, _, _, _ = pair("batch 1d", "int8")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(torch.randn(1, 6, dtype=torch.float64, requires_grad=True))


def test_a_relu_in_place_may_follow():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    plain = copy.deepcopy(model)
    dropit.to_dropit(model, gamma=0.0, compress="int8")
    x = torch.randn(4, 3, 9, 9)
    y, exact = model(x), plain(x)
    assert torch.equal(y, exact)
    y.square().sum().backward()
    exact.square().sum().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name != "0.bias":  # before a normalization its gradient is rounding noise
            assert (got.grad - expected.grad).norm() <= 0.02 * expected.grad.norm()


@pytest.mark.parametrize("mixed", [True, False], ids=["float32 weights", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_half_precision_adds_the_rounding_of_the_stored_form_alone(name, dtype, mixed):
    """At a mean of 30 deviations, as of an image's raw channels, a mean that is rounded is off by a tenth of one."""
    ours, plain, x, _ = pair(name, "int8", torch.float32)
    exact = copy.deepcopy(plain).to(dtype).double()  # of the same numbers
    ours, plain = (module.to(dtype) if not mixed or name == "rms" else module for module in (ours, plain))
    x = (x * 0.3 + 29).to(dtype)
    grad_output = torch.randn(x.shape).to(dtype)
    y, got = gradients(ours, x, grad_output)
    by_plain, plains = gradients(plain, x, grad_output)
    _, true = gradients(exact if not mixed else copy.deepcopy(plain).double(), x.double(), grad_output.double())
    assert torch.equal(y, by_plain)
    for ours_one, plain_one, true_one in zip(got, plains, true, strict=True):
        errors = [(each.double() - true_one).norm() / true_one.norm() for each in (ours_one, plain_one)]
        assert errors[0] < errors[1] + 0.02


@pytest.mark.parametrize("name", ["layer", "group"])
def test_half_precision_offers_its_output_as_it_is(name):
    """PyTorch returns a rounded mean, but does not compute with it."""
    ours, _, x, _ = pair(name, "int8", torch.bfloat16)
    y = ours((x * 0.3 + 29).requires_grad_())
    saved = ours.saver.memo.published(y).saved
    assert (saved.restore() - y).float().norm() < 0.02 * y.float().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-3], ids=["default eps", ""])
def test_small_inputs_of_rms_norm_meet_the_operators_own_eps(eps, dtype):
    plain = nn.RMSNorm(48, eps=eps, dtype=dtype)
    ours = dropit.to_dropit(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(plain)]), compress="int8")[1]
    x, grad_output = (torch.randn(9, 48) * 0.01).to(dtype), torch.randn(9, 48).to(dtype)
    (y, got), (exact, expected) = gradients(ours, x, grad_output), gradients(plain, x, grad_output)
    assert torch.equal(y, exact)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("name", ["batch 1d", "batch 2d", "batch 2d, no weight", "batch 3d", "group"])
def test_another_number_of_channels_is_pytorchs_error(name, channels):
    ours, plain, x, _ = pair(name, "int8")
    x = torch.randn(x.shape[0], channels, *x.shape[2:], dtype=x.dtype, requires_grad=True)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as got:
        ours(x)
    assert str(got.value) == str(expected.value)


def backward_after_a_change(module, name, x):
    """What is raised where the parameter is changed before the backward pass, as by an optimizer between two."""
    y = module(x)
    y.square().sum().backward(retain_graph=True)
    with torch.no_grad():
        module.get_parameter(name).add_(1)
    try:
        y.square().sum().backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return None


@pytest.mark.parametrize("compress", ["int16", "int8"])
@pytest.mark.parametrize("needs_input", [True, False], ids=["input", "weights alone"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_a_parameter_may_be_changed_before_the_backward_pass_where_it_may_in_pytorch(
    name, parameter, needs_input, compress
):
    ours, plain, x, _ = pair(name, compress)
    if getattr(plain, parameter, None) is None:
        pytest.skip("it has none")
    x.requires_grad_(needs_input)
    assert backward_after_a_change(ours, parameter, x) == backward_after_a_change(plain, parameter, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("name", ["batch 2d", "layer", "group", "rms"])
def test_parametrized_weights_are_read_once(name, needs_input, training):
    ours, _, x, _ = pair(name, "int8")
    readings = []

    class Noted(nn.Module):
        def forward(self, value):
            readings.append(value)
            return value * 2

    nn.utils.parametrize.register_parametrization(ours, "weight", Noted())
    readings.clear()
    ours.train(training)(x.requires_grad_(needs_input))
    assert len(readings) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_without_elements(name):
    ours, plain, x, _ = pair(name, "int8")
    x = x.new_zeros(0, *x.shape[1:]) if x.dim() > 1 else x.new_zeros(0, 48)
    (y, got), (exact, expected) = (gradients(module, x, x) for module in (ours, plain))
    assert y.shape == exact.shape
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 6, 1, 8)], ids=str)
def test_a_batch_of_one_whose_gradient_is_laid_out_otherwise(shape):
    """PyTorch's own backward errs on the CPU; plain networks meet that less often than its error would have it."""
    plain = nn.BatchNorm1d(6) if len(shape) == 3 else nn.BatchNorm2d(6)
    ours = dropit.to_dropit(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(plain)]), compress="int16")[1]
    x = torch.randn(shape)
    transposed = torch.randn(shape).transpose(1, -1).contiguous().transpose(1, -1)
    expanded = torch.randn(1, 6, *[1] * (len(shape) - 2)).expand(shape)
    for grad_output in (transposed, expanded, torch.randn(shape)):
        _, got = gradients(ours, x, grad_output)
        _, expected = gradients(plain.double(), x.double(), grad_output.double().contiguous())
        for one, other in zip(got, expected, strict=True):
            assert (one - other).norm() < 1e-3 * max(other.norm(), grad_output.norm())


def test_complex_inputs_are_left_to_pytorch():
    ours, plain, _, _ = pair("rms", "int8")
    x = torch.randn(5, 48, dtype=torch.complex128)
    (y, got), (exact, expected) = (gradients(module, x, torch.ones_like(x) * 1j) for module in (ours, plain))
    assert torch.equal(y, exact)
    assert all(map(torch.equal, got, expected))
