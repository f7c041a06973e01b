"""Activation checkpointing, of both kinds and under saved-tensors hooks: gradients are those without it."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import dropit

KINDS = {"reentrant": True, "not reentrant": False}
# What each setting's gradients differ by at most, checkpointed or not: rounding is that of another tensor at a region's
# edges, where what another layer stores is out of reach.
SETTINGS = {
    "lossless": ({"gamma": 0.0}, 0.0),
    "dropped": ({"gamma": 0.9}, 0.0),
    "int8": ({"gamma": 0.9, "compress": "int8"}, 0.02),
    "int16": ({"gamma": 0.9, "compress": "int16"}, 1e-3),
}


class Block(nn.Module):
    """A block with its normalization last, so that what it returns is read in the next one."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(self.act(self.up(x)))))


class Blocks(nn.Module):
    def __init__(self, use_reentrant=None, dropout=0.0):
        super().__init__()
        self.first, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(3)])
        self.last = nn.Linear(32, 8)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.last(x)


def inside(name, model):
    return {"no hooks": contextlib.nullcontext, "meter": lambda: dropit.CacheMeter(model), "cpu": save_on_cpu}[name]()


def gradients(model, x, hooks="no hooks", backwards=1):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    with inside(hooks, model):
        loss = model(x).square().sum()
    for last in range(backwards)[::-1]:
        for each in inputs:
            each.grad = None
        loss.backward(retain_graph=last > 0)
    return [each.grad for each in inputs]


def pair(use_reentrant, options, dropout=0.0):
    torch.manual_seed(0)
    model = dropit.to_dropit(Blocks(dropout=dropout), **options)
    checkpointed = copy.deepcopy(model)
    checkpointed.use_reentrant = use_reentrant
    return model, checkpointed


def error(got, expected):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("hooks", ["no hooks", "meter", "cpu"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_it(kind, setting, hooks):
    options, tolerance = SETTINGS[setting]
    model, checkpointed = pair(KINDS[kind], options)
    x = torch.randn(64, 32)
    assert error(gradients(checkpointed, x, hooks), gradients(model, x)) <= tolerance


RANDOM = {
    "random": {"strategy": "random", "gamma": 0.5},
    "random, seeded": {"strategy": "random", "gamma": 0.5, "seed": 7},
    "stochastic": {"compress": "int8", "stochastic": True},
    "random channels": {"strategy": "random_c", "gamma": 0.5},
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("kind", KINDS)
def test_dropouts_mask_is_the_same_in_both_runs(kind, name):
    """The first layer's gradient, which no choice at random of its own reaches, tells: every mask is part of it."""
    model, checkpointed = pair(KINDS[kind], RANDOM[name], dropout=0.5)
    plain = dropit.from_dropit(copy.deepcopy(model))
    x = torch.randn(64, 32)
    got, expected = gradients(checkpointed, x)[0], gradients(plain, x)[0]
    assert error([got], [expected]) < 0.05


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("kind", KINDS)
def test_repeated_backward_passes_make_the_same_choice(kind, name):
    _, checkpointed = pair(KINDS[kind], RANDOM[name], dropout=0.5)
    x = torch.randn(64, 32)
    once = gradients(copy.deepcopy(checkpointed), x)
    assert all(map(torch.equal, gradients(checkpointed, x, backwards=3), once))


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_makes_another_choice(kind):
    _, checkpointed = pair(KINDS[kind], RANDOM["random"])
    x = torch.randn(64, 32)
    seen = {tuple(gradients(checkpointed, x)[1].flatten().tolist()) for _ in range(5)}
    assert len(seen) == 5
