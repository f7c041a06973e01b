"""Layers of torchvision, timm and transformers that have a forward of their own."""

import copy
import importlib

import pytest
import torch

import dropit

LAYERS = {
    "torchvision LayerNorm2d": ("torchvision.models.convnext", "LayerNorm2d", (6,), {}, (2, 6, 5, 7)),
    "timm LayerNorm": ("timm.layers.norm", "LayerNorm", (48,), {}, (4, 9, 48)),
    "timm LayerNorm2d": ("timm.layers.norm", "LayerNorm2d", (6,), {}, (2, 6, 5, 7)),
    "timm BatchNormAct2d": ("timm.layers.norm_act", "BatchNormAct2d", (6,), {}, (4, 6, 5, 7)),
    "timm BatchNormAct2d, no act": ("timm.layers.norm_act", "BatchNormAct2d", (6,), {"apply_act": False}, (4, 6, 5, 7)),
    "timm GELU": ("timm.layers.activations", "GELU", (), {}, (4, 60)),
    "timm GELUTanh": ("timm.layers.activations", "GELUTanh", (), {}, (4, 60)),
    "timm ScaledStdConv2d": ("timm.layers.std_conv", "ScaledStdConv2d", (4, 6, 3), {"stride": 2}, (2, 4, 9, 9)),
    "transformers GELU": ("transformers.activations", "GELUActivation", (), {}, (4, 60)),
    "transformers GELU in Python": ("transformers.activations", "GELUActivation", (True,), {}, (4, 60)),
    "transformers NewGELU": ("transformers.activations", "NewGELUActivation", (), {}, (4, 60)),
    "transformers BloomGelu": ("transformers.models.bloom.modeling_bloom", "BloomGelu", (), {}, (4, 60)),
    "transformers QuickGELU": ("transformers.activations", "QuickGELUActivation", (), {}, (4, 60)),
    "transformers Conv1D": ("transformers.pytorch_utils", "Conv1D", (12, 60), {}, (4, 60)),
}


def gradients(module, x):
    x = x.detach().requires_grad_()
    y = module(x * 1)
    grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, torch.autograd.grad(y, [x, *module.parameters()], grad_output)


@pytest.mark.parametrize(("compress", "tolerance"), [("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_exact_and_gradients_close(name, compress, tolerance):
    module, kind, arguments, keywords, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = getattr(importlib.import_module(module), kind)(*arguments, **keywords)
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), copy.deepcopy(plain)])
    ours = dropit.to_dropit(model, gamma=0.0, compress=compress)[1]
    assert type(ours) is not type(plain)
    x = torch.randn(shape)
    (y, grads), (exact, exact_grads) = gradients(ours, x), gradients(plain, x)
    assert torch.equal(y, exact)
    for got, expected in zip(grads, exact_grads, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm() + 1e-5
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    with dropit.CacheMeter(ours) as meter, torch.no_grad():
        ours.train()(x)
    assert meter.total_bytes == 0


@pytest.mark.parametrize("name", LAYERS)
def test_less_is_held(name):
    module, kind, arguments, keywords, shape = LAYERS[name]
    plain = getattr(importlib.import_module(module), kind)(*arguments, **keywords)
    x = torch.randn(shape, requires_grad=True)
    held = []
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), copy.deepcopy(plain)])
    for layer in (plain, dropit.to_dropit(model, compress="int8")[1]):
        with dropit.CacheMeter(layer) as meter:
            y = layer(x * 1)
        held.append(meter.total_bytes)
        del y
    if "Python" in name:
        assert held[1] == held[0]
    else:
        assert held[1] < held[0] * (0.6 if layer.drops_input else 0.45)


def test_a_package_of_another_version_is_no_error(monkeypatch):
    from dropit.layers import table

    monkeypatch.setitem(table._LAZY, "elsewhere", "dropit.layers.not_there")
    other = type("Other", (torch.nn.Module,), {"__module__": "elsewhere"})
    assert table.swap_for(other) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "GELU" not in name.upper()])
def test_parametrized_weights_are_read_as_often_as_by_plain(name, frozen, training):
    module, kind, arguments, keywords, shape = LAYERS[name]
    plain = getattr(importlib.import_module(module), kind)(*arguments, **keywords)
    counts = []
    for converted in (False, True):
        model = torch.nn.ModuleList([torch.nn.Linear(2, 2), copy.deepcopy(plain)])
        layer = dropit.to_dropit(model, compress="int8")[1] if converted else model[1]
        readings = []

        class Noted(torch.nn.Module):
            def forward(self, value, readings=readings):
                readings.append(value)
                return value * 2

        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Noted())
        readings.clear()
        layer.requires_grad_(not frozen).train(training)(torch.randn(shape))
        counts.append(len(readings))
    assert counts[0] == counts[1]
