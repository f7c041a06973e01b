"""Compiled models, over batches of several sizes: no break, one recompilation, gradients as without compiling."""

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import dropit

SIZES = (8, 11, 13)
SETTINGS = {"lossless": {"gamma": 0.9}, "int8": {"gamma": 0.0, "compress": "int8"}}


class Attention(nn.Module):
    """Calls attention as a function."""

    def __init__(self):
        super().__init__()
        self.together, self.project = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.together(x).chunk(3, -1))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(32, 4, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


def images(samples):
    return torch.randn(samples, 8, 12, 12)


def tokens(samples):
    return torch.randn(samples, 9, 32)


def seq(*layers):
    return nn.Sequential(*layers)


FAMILIES = {
    "linear, ReLU": (lambda: seq(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), tokens),
    "convolution, batch norm, pool": (
        lambda: seq(
            nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)
        ),
        images,
    ),
    "layer norm, GELU": (lambda: seq(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)), tokens),
    "group norm, SiLU": (
        lambda: seq(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(inplace=True), nn.Conv2d(16, 8, 3)),
        images,
    ),
    "RMS norm": (lambda: seq(nn.Linear(32, 64), nn.RMSNorm(64), nn.Linear(64, 8)), tokens),
    "transposed convolution, average pool": (
        lambda: seq(
            nn.ConvTranspose2d(8, 8, 3, stride=2), nn.AvgPool2d(2), nn.Hardtanh(), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1)
        ),
        images,
    ),
    "sigmoid, tanh, Mish, Hardswish": (
        lambda: seq(nn.Linear(32, 64), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Hardswish(), nn.Linear(64, 8)),
        tokens,
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), tokens),
    "attention with weights": (lambda: seq(nn.Linear(32, 32), SelfAttention(True)), tokens),
    "attention": (lambda: seq(nn.Linear(32, 32), SelfAttention(False)), tokens),
    "functional attention": (lambda: seq(nn.Linear(32, 32), Attention()), tokens),
}


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def check(make, batch, options, backend, tolerance, monkeypatch):
    # Compiled layers store each for itself, and so do these.
    monkeypatch.setattr("dropit.stored.is_traced", lambda: True)
    monkeypatch.setattr("dropit.packer.is_traced", lambda: True)
    torch._dynamo.reset()
    counters.clear()
    model = dropit.to_dropit(make(), **options)
    eager, compiled = copy.deepcopy(model), torch.compile(model, backend=backend, fullgraph=True)
    for samples in SIZES:
        x = batch(samples)
        got, expected = gradients(compiled, x), gradients(eager, x)
        scale = max(grad.norm() for grad in expected if grad is not None)
        for ours, exact in zip(got, expected, strict=True):
            assert (ours is None) == (exact is None)
            assert exact is None or (ours - exact).norm() <= tolerance * exact.norm() + 1e-5 * scale
    # One for the first size, one for all others; a TransformerEncoderLayer takes one more, plain too.
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_of_layers(name, setting, monkeypatch):
    check(*FAMILIES[name], SETTINGS[setting], "aot_eager", 1e-4, monkeypatch)


@pytest.mark.parametrize("strategy", ["fastmink", "mink_c"])
def test_a_second_model_with_another_gamma(strategy):
    torch._dynamo.reset()
    for gamma in (0.9, 0.5):
        model = dropit.to_dropit(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 8)), strategy, gamma)
        eager, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
        for samples in (8, 11):
            x = torch.randn(samples, 256)
            for ours, exact in zip(gradients(compiled, x), gradients(eager, x), strict=True):
                torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("layer", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_an_activation_in_place_of_what_comes_from_outside(layer):
    torch._dynamo.reset()
    plain = nn.Sequential(layer(), nn.Linear(16, 4))
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    ours[0].inplace = True
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 16)
    grads = []
    for model in (plain, compiled):
        leaf = x.clone().requires_grad_()
        model(leaf * 1).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_hides_a_row_whole(kind):
    """As left padding and a causal mask do together."""

    class Masked(Attention):
        def forward(self, x, mask):
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.together(x).chunk(3, -1))
            return self.project(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    torch._dynamo.reset()
    model = dropit.to_dropit(Masked(), gamma=0.0, compress="int8")
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[:, :3] = False
    if kind == "float":
        mask = torch.zeros(9, 9).masked_fill_(~mask, -torch.inf)
    x = tokens(4)
    grads = []
    for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        each(x, mask).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, exact in zip(*grads, strict=True):
        assert ours.isfinite().all()
        assert (ours - exact).norm() <= 1e-3 * exact.norm() + 1e-5
