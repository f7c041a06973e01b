"""Inputs of any dtype and layout, in autocast or out of it: outputs, gradients and their layouts are plain PyTorch's.

A gradient's layout is what the layer before is handed. PyTorch's own BatchNorm errs on the CPU with some.
"""

import copy
import importlib

import pytest
import torch
from torch import nn

import dropit

IMAGE, LINE, VOLUME = (4, 8, 6, 5), (4, 8, 11), (3, 4, 4, 5, 3)
LAYERS = {
    "conv 1d": (nn.Conv1d(8, 6, 3, padding=1), LINE),
    "conv 2d": (nn.Conv2d(8, 6, 3, padding=1), IMAGE),
    "conv 2d, strided": (nn.Conv2d(8, 6, 3, stride=2, bias=False), IMAGE),
    "conv 2d, by channel": (nn.Conv2d(8, 8, 3, groups=8), IMAGE),
    "conv 2d, pointwise": (nn.Conv2d(8, 6, 1), IMAGE),
    "conv 2d, same": (nn.Conv2d(8, 6, (2, 4), padding="same"), IMAGE),
    "conv 2d, reflect": (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv 3d": (nn.Conv3d(4, 6, 2, padding=1), VOLUME),
    "transposed 1d": (nn.ConvTranspose1d(8, 6, 3, padding=1), LINE),
    "transposed 2d": (nn.ConvTranspose2d(8, 6, 3, stride=2), IMAGE),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, padding=1), VOLUME),
    "batch 1d": (nn.BatchNorm1d(8), LINE),
    "batch 2d": (nn.BatchNorm2d(8), IMAGE),
    "batch 2d, no weight": (nn.BatchNorm2d(8, affine=False), IMAGE),
    "batch 3d": (nn.BatchNorm3d(4), VOLUME),
    "layer": (nn.LayerNorm(5), IMAGE),
    "layer, no bias": (nn.LayerNorm(11, bias=False), LINE),
    "layer, two dimensions": (nn.LayerNorm((6, 5)), IMAGE),
    "group": (nn.GroupNorm(2, 8), IMAGE),
    "group, no weight": (nn.GroupNorm(2, 8, affine=False), LINE),
    "group 3d": (nn.GroupNorm(2, 4), VOLUME),
    "rms": (nn.RMSNorm(5), IMAGE),
    "rms, line": (nn.RMSNorm(11), LINE),
    "relu": (nn.ReLU(), IMAGE),
    "relu, in place": (nn.ReLU(inplace=True), IMAGE),
    "relu6": (nn.ReLU6(), VOLUME),
    "hardtanh": (nn.Hardtanh(-0.3, 0.7), IMAGE),
    "hardtanh, in place": (nn.Hardtanh(-0.3, 0.7, inplace=True), IMAGE),
    "leaky": (nn.LeakyReLU(), IMAGE),
    "max 1d": (nn.MaxPool1d(2), LINE),
    "max 2d": (nn.MaxPool2d(2), IMAGE),
    "max 3d": (nn.MaxPool3d(2), VOLUME),
    "average 1d": (nn.AvgPool1d(2), LINE),
    "average 2d": (nn.AvgPool2d(2), IMAGE),
    "average 3d": (nn.AvgPool3d(2), VOLUME),
    "adaptive 1d": (nn.AdaptiveAvgPool1d(2), LINE),
    "adaptive 2d": (nn.AdaptiveAvgPool2d(2), IMAGE),
    "adaptive 2d to one": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive 3d": (nn.AdaptiveAvgPool3d(2), VOLUME),
    "dropout": (nn.Dropout(0.3), IMAGE),
    "timm LayerNorm2d": ("timm.layers.norm", "LayerNorm2d", (8,), IMAGE),
    "timm BatchNormAct2d": ("timm.layers.norm_act", "BatchNormAct2d", (8,), IMAGE),
    "timm ScaledStdConv2d": ("timm.layers.std_conv", "ScaledStdConv2d", (8, 6, 3), IMAGE),
    "torchvision LayerNorm2d": ("torchvision.models.convnext", "LayerNorm2d", (8,), IMAGE),
}


def inputs(shape):
    """By name: tensors of the shape, or one like it, in all layouts."""
    one = (1, *shape[1:])
    yield "contiguous", torch.randn(shape)
    yield "batch of one", torch.randn(one)
    yield "batch of one, sliced", torch.randn(shape)[1:2]
    yield "no batch", torch.randn(0, *shape[1:])
    yield "unbatched", torch.randn(shape[1:])
    yield "transposed", torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    yield "batch innermost", torch.randn(shape[-1], *shape[1:-1], shape[0]).transpose(0, -1)
    yield "channels innermost", torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    yield "sliced", torch.randn(2 * shape[0], *shape[1:])[::2]
    yield "expanded", torch.randn(one).expand(shape)
    if len(shape) > 3:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        yield "channels_last", torch.randn(shape).to(memory_format=last)
        yield "channels_last, batch of one", torch.randn(one).to(memory_format=last)
        wide = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(memory_format=last)
        yield "channels_last, sliced", wide[:, ::2]


def pair(name, compress, gamma, dtype=torch.float32):
    """The layer converted and plain."""
    torch.manual_seed(0)
    plain, shape = LAYERS[name][0], LAYERS[name][-1]
    if isinstance(plain, str):
        module, kind, arguments = LAYERS[name][:3]
        plain = getattr(importlib.import_module(module), kind)(*arguments)
    plain = copy.deepcopy(plain).to(dtype)
    ours = dropit.to_dropit(nn.ModuleList([nn.Linear(2, 2), copy.deepcopy(plain)]), compress=compress, gamma=gamma)[1]
    assert type(ours) is not type(plain)
    return ours, plain, shape


def step(module, x, grad_layout=torch.contiguous_format, autocast=False):
    """The output and the gradients, or the error."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x.clone() if getattr(module, "inplace", False) else x)
        grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        if y.dim() == 4:
            grad_output = grad_output.to(memory_format=grad_layout)
        wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        return y, torch.autograd.grad(y, wanted, grad_output)
    except (RuntimeError, ValueError, AssertionError) as error:
        return type(error)


def check(ours, plain, x, **how):
    """Same output, and same layout of the input's gradient; same gradient where nothing is approximated in it."""
    got, expected = step(ours, x, **how), step(plain, x, **how)
    if isinstance(expected, type):
        assert got is expected
        return
    (y, grads), (exact, exact_grads) = got, expected
    assert (y.dtype, y.stride(), y.requires_grad) == (exact.dtype, exact.stride(), exact.requires_grad)
    assert torch.equal(y, exact)
    if min(x.shape) > 0:
        assert grads[0].stride() == exact_grads[0].stride()
    names = ["input", *(name for name, parameter in ours.named_parameters() if parameter.requires_grad)]
    for name, one, other in zip(names, grads, exact_grads, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        drops = ours.drops_input or isinstance(ours, nn.Conv2d)
        if ours.quantizes and not drops:
            tolerance = 1e-3 if other.dtype.itemsize > 2 and y.dtype.itemsize > 2 else 2e-2
            scale = max(other.double().norm(), 1e-2 * exact.double().norm())
            assert (one.double() - other.double()).norm() <= tolerance * scale
        elif name in ("input", "bias") or not drops:
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("grad_layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", LAYERS)
def test_layouts(name, frozen, grad_layout):
    for _, x in inputs(LAYERS[name][-1]):
        ours, plain, _ = pair(name, "int16", gamma=0.9)
        for module in (ours, plain):
            module.requires_grad_(not frozen)
        check(ours, plain, x, grad_layout=grad_layout)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", ""])
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name, weights, dtype, autocast):
    ours, plain, shape = pair(name, "int16", gamma=0.9, dtype=weights or dtype)
    check(ours, plain, torch.randn(shape).to(dtype), autocast=autocast)


class NoGradient(torch.autograd.Function):
    """Somebody's own, or a checkpointed region: its input has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


class Unreached(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.other = layer, nn.Linear(4, 4)

    def forward(self, x):
        return NoGradient.apply(self.layer(x)) + self.other(x)


@pytest.mark.parametrize("compress", ["lossless", "int8"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1), nn.PReLU()], ids=str
)
def test_a_layer_that_no_gradient_reaches_has_none(layer, compress):
    torch.manual_seed(0)
    plain = Unreached(nn.Sequential(nn.Linear(4, 4), layer, nn.GELU(), nn.ReLU()))
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.5, compress=compress)
    for model in (plain, ours):
        model(torch.randn(200, 3, 4)).sum().backward()
    for (name, parameter), mine in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (mine.grad is None) == (parameter.grad is None), name


ENSEMBLES = {"linear": lambda: nn.Linear(64, 8), "convolution": lambda: nn.Conv1d(1, 4, 3)}


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_under_vmap(name, gamma):
    """Many weights and one input, which torch.func.vmap does not map."""
    members = [ENSEMBLES[name]() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(5, 1, 64) if name == "convolution" else torch.randn(5, 64)
    results = []
    for base in (copy.deepcopy(members[0]), dropit.to_dropit(copy.deepcopy(members[0]), gamma=gamma)):

        def loss(parameters, buffers, x, base=base):
            return torch.func.functional_call(base, (parameters, buffers), (x,)).square().sum()

        losses = torch.func.vmap(loss, (0, 0, None))(parameters, buffers, x)
        grads = torch.autograd.grad(losses.sum(), list(parameters.values()))
        mapped = {key: value.detach() for key, value in parameters.items()}
        by_func = torch.func.vmap(torch.func.grad(loss), (0, 0, None))(mapped, buffers, x)
        results.append([*grads, *by_func.values()])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)
