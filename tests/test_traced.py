"""What layers share within a compiled graph: as much as in eager mode, and nothing of a tensor that was changed."""

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import dropit

INT8 = {"gamma": 0.0, "compress": "int8"}


class Reading(nn.Module):
    """A Linear reads the output of a normalization, to which something was done in between."""

    def __init__(self, between):
        super().__init__()
        self.norm, self.between, self.linear = nn.LayerNorm(32), between, nn.Linear(32, 32)

    def forward(self, x):
        y = self.norm(x * 1)
        return self.linear(self.between(y)).sin() * y


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def gradients(model, forward, *inputs):
    model.zero_grad()
    torch.manual_seed(0)
    forward(*inputs).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def bytes_saved(model, forward, x):
    with dropit.CacheMeter(model) as meter:
        y = forward(x)
    assert y is not None
    return meter.total_bytes


def set_item(y):
    y[:, 3] = 1
    return y


WRITES = {
    "+=": lambda y: y.__iadd__(1),
    "an item": set_item,
    "a view": lambda y: y.view(-1).mul_(2).view_as(y),
    "a slice": lambda y: y[0].zero_() * 0 + y,
    "relu_": torch.relu_,
    "F.relu": lambda y: F.relu(y, True),
    "copy_": lambda y: y.copy_(y * 2),
    "without autograd": lambda y: y.detach().mul_(3) * 0 + y,
    "an operator": lambda y: torch.ops.aten.mul_(y, 3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_tensor_that_was_changed_in_place_is_saved_again(write):
    plain = Reading(write)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    x = torch.randn(8, 32)
    for got, exact in zip(gradients(ours, compiled(ours), x), gradients(plain, compiled(plain), x), strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()


SHARING = {
    "as it is": lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)),
    "by several": lambda: nn.Sequential(nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)),
    "no dropout": lambda: nn.Sequential(nn.LayerNorm(32), nn.Dropout(0.0), nn.Linear(32, 32)),
    "activation": lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
    "activation in place": lambda: nn.Sequential(nn.LayerNorm(32), nn.SiLU(inplace=True), nn.Linear(32, 32)),
    "ReLU in place": lambda: nn.Sequential(nn.LayerNorm(32), nn.ReLU(inplace=True), nn.Linear(32, 32)),
}


class Together(nn.Module):
    """Gives attention one tensor as queries, keys and values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for layer in self.model:
            x = layer(x, x, x, need_weights=False)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        return x


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_a_graph_holds_no_more_than_eager_mode(make, half):
    model = dropit.to_dropit(Together(make()), **INT8)
    x = torch.randn(4, 16, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert bytes_saved(model, compiled(model), x) <= bytes_saved(model, model, x)


class GatedNorm(nn.Module):
    """A hand-written RMSNorm and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        x = x.to(torch.float32)
        normalized = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
        rows = normalized.view(-1, 64)
        return self.down(F.silu(self.gate(rows)) * self.up(rows)).view_as(x)


def test_functions_share_in_a_graph_as_well():
    model = dropit.to_dropit(nn.Sequential(nn.Linear(64, 64), GatedNorm()), **INT8)
    x = torch.randn(4, 32, 64)
    eager = bytes_saved(model, model, x)
    assert bytes_saved(model, compiled(model), x) <= 1.02 * eager
    for got, exact in zip(gradients(model, compiled(model), x), gradients(model, model, x), strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()


def test_what_leaves_a_graph_is_not_looked_at_by_another():
    """Each layer a graph of its own: no step takes another one."""
    torch._dynamo.reset()
    counters.clear()
    model = dropit.to_dropit(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU()), **INT8)
    for layer in model:
        layer.compile(backend="aot_eager", fullgraph=True)
    for _ in range(4):
        model(torch.randn(8, 32)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 3


def test_another_models_layers_do_not_read_it():
    """A lossless Linear behind the normalization of a model in 4 bits has the plain gradient."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = dropit.to_dropit(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), gamma=0, compress="int4")
            self.second = dropit.to_dropit(nn.Sequential(nn.Linear(32, 32)), gamma=0)

        def forward(self, x):
            return self.second(self.first(x))

    model, x = Two(), torch.randn(8, 32)
    got = gradients(model, compiled(model), x)
    dropit.from_dropit(model)
    exact = gradients(model, model, x)
    torch.testing.assert_close(got[-2:], exact[-2:])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout_is_quantized_in_a_graph(causal):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.together, self.project = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.together(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=causal)
            return self.project(y.transpose(1, 2).flatten(2))

    plain = Attention()
    ours, x = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16"), torch.randn(2, 48, 64)
    # The same seed draws the same numbers, so that the same weights are dropped.
    for got, exact in zip(gradients(ours, compiled(ours), x), gradients(plain, compiled(plain), x), strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()
    dropit.to_dropit(ours, **INT8)
    assert bytes_saved(ours, compiled(ours), x) < 0.4 * bytes_saved(plain, compiled(plain), x)


def test_backward_hooks_that_break_a_graph():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.last(self.linear(x) * x.sigmoid())

    plain = Scaled()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    x = torch.randn(8, 32)
    for model in (ours, plain):
        model.linear.register_full_backward_hook(lambda *_: None)
    torch._dynamo.reset()
    got = gradients(ours, torch.compile(ours, backend="aot_eager"), x)
    for ours_grad, exact in zip(got, gradients(plain, plain, x), strict=True):
        assert (ours_grad - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_what_is_published_may_leave_a_graph(form):
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            y = self.norm(x * 1)
            found = [y, y.view(-1, 32), self.linear(F.silu(y) * y)]
            return form(zip("abc", found, strict=True)) if form is dict else form(found)

    torch._dynamo.reset()
    counters.clear()
    model = dropit.to_dropit(Outputs(), **INT8)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        outputs = run(torch.randn(4, 8, 32))
        sum(y.sum() for y in (outputs.values() if form is dict else outputs)).backward()
    assert counters["stats"]["unique_graphs"] == 1


class Blocks(nn.Module):
    """Calls functions itself, around blocks that do so too, and one that does not."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([GatedNorm(), GatedNorm()])
        self.plain = nn.Sequential(nn.Linear(64, 64), nn.Softsign())

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) * x.sigmoid()
        return self.plain(x) * x.tanh()


def test_blocks_of_an_eager_model_may_be_compiled():
    plain = Blocks()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    graphs = {}
    for model in (plain, ours):
        torch._dynamo.reset()
        counters.clear()
        for part in (*model.blocks, model.plain):
            part.compile(backend="aot_eager", fullgraph=True)
        grads = [gradients(model, model, torch.ones(2, size, 64).cumsum(1)) for size in (4, 4, 7, 9)]
        graphs[model] = (counters["stats"]["unique_graphs"], grads)
    assert graphs[ours][0] <= graphs[plain][0]
    for got, exact in zip(graphs[ours][1][-1], graphs[plain][1][-1], strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x) * x


class Checkpointing(nn.Module):
    """Calls no function itself but a checkpoint, within which one is called."""

    def __init__(self):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(32), Product()

    def forward(self, x):
        return checkpoint(self.block, self.norm(x), use_reentrant=False)


def test_a_checkpointed_block_breaks_no_graph():
    plain = Checkpointing()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    x = torch.randn(8, 32)
    for got, exact in zip(gradients(ours, compiled(ours), x), gradients(plain, compiled(plain), x), strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()
