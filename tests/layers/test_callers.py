import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropit


class Attention(nn.Module):
    """As people write it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.proj, self.dropout = nn.Linear(64, 192), nn.Linear(64, 64), dropout

    def forward(self, x):
        """x: (N, L, 64)."""
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class Subclass(Attention):
    """With its parent's forward."""


class Decorated(Attention):
    """With a forward that wraps one that calls attention."""

    @functools.wraps(Attention.forward)
    def forward(self, *args):
        return Attention.forward(self, *args)


def step(model, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), torch.cat(
        [x.grad.flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]
    )


def held(model, x):
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    del y
    return meter


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 32, 64)


@pytest.mark.parametrize("kind", [Attention, Subclass, Decorated])
@pytest.mark.parametrize(("compress", "bits", "tolerance"), [("int8", 8, 0.02), ("int4", 4, 0.25), ("int2", 2, 0.8)])
def test_its_queries_keys_and_values_take_few_bits(kind, compress, bits, tolerance, x):
    plain = kind()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress=compress)
    n = x.numel()
    assert held(ours, x).by_operator()["DropITScaledDotProduct"] == 3 * (n * bits // 8 + n // 16)
    y, grads = step(plain, x)
    our_y, our_grads = step(ours, x)
    assert torch.equal(y, our_y)
    assert 0 < (grads - our_grads).norm() < tolerance * grads.norm()


@pytest.mark.parametrize("compress", ["none", "lossless"])
def test_otherwise_it_stays_as_it_is(compress, x):
    model = dropit.to_dropit(Attention(), compress=compress)
    assert (type(model) is Attention) == (compress == "none")
    assert "DropITScaledDotProduct" not in held(model, x).by_operator()


def test_it_is_spoken_of_and_can_be_left_out(x):
    model = nn.Sequential(Attention(), Attention())
    dropit.to_dropit(model, compress="int8", filter_fn=lambda module, fqn: fqn != "1")
    rows = {row.fqn: row.status for row in dropit.coverage(model)}
    assert rows["0"] == rows["0.qkv"] == "converted"
    assert "plain" in rows["1"]
    assert type(dropit.from_dropit(model)[0]) is Attention


def test_in_evaluation_and_without_gradients_nothing_happens(x):
    model = dropit.to_dropit(Attention(), compress="int8")
    with torch.no_grad():
        assert torch.equal(model(x), dropit.from_dropit(copy.deepcopy(model))(x))
    model.eval()
    assert "DropITScaledDotProduct" not in held(model, x).by_operator()


def test_dropout_is_the_same_in_backward(x):
    plain = Attention(dropout=0.3)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    torch.manual_seed(1)
    y, grads = step(plain, x)
    torch.manual_seed(1)
    our_y, our_grads = step(ours, x)
    assert torch.equal(y, our_y)
    assert (grads - our_grads).norm() < 0.02 * grads.norm()


def test_copies_pickles_and_checkpoints(x):
    model = dropit.to_dropit(Attention(), gamma=0.0, compress="int8")
    _, grads = step(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(step(other, x)[1], grads)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    assert torch.equal(step(Checkpointed(), x)[1], grads)


def test_it_compiles_whole(x):
    model = dropit.to_dropit(Attention(), gamma=0.0, compress="int8")
    _, grads = step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x)[1], grads)


def test_the_estimate_knows_it(x):
    model = dropit.to_dropit(Attention(), compress="int8")
    assert dropit.estimate_cache(model, x.shape).total_bytes == held(model, x).total_bytes
    dropit.from_dropit(model)
    assert dropit.estimate_cache(model, x.shape).total_bytes == held(model, x).total_bytes


def test_a_learned_bias_keeps_its_gradient(x):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.bias = nn.Linear(64, 64), nn.Parameter(torch.zeros(32, 32))

        def forward(self, x):
            return F.scaled_dot_product_attention(self.proj(x), x, x, self.bias)

    model = dropit.to_dropit(Biased(), compress="int8")
    model(x).square().sum().backward()
    assert model.bias.grad.abs().sum() > 0


class Outer(nn.Module):
    """Calls attention itself, and a module inside that does so too."""

    def __init__(self):
        super().__init__()
        self.inner, self.proj = Attention(), nn.Linear(64, 64)

    def forward(self, x):
        x = self.inner(x)
        return F.scaled_dot_product_attention(x, self.proj(x), x)


def quantized(model, x):
    """How often the graph of the model's output has quantized attention."""
    count, pending, seen = 0, [model(x).grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            count += "DropITScaledDotProduct" in node.name()
            pending += [following for following, _ in node.next_functions]
    return count


def test_a_module_inside_is_quantized_on_its_own_account(x):
    model = dropit.to_dropit(Outer(), compress="int8")
    assert quantized(model, x) == 2
    model.inner.eval()
    assert quantized(model, x) == 1
    dropit.from_dropit(model)
    dropit.to_dropit(model, compress="int8", filter_fn=lambda module, fqn: fqn != "inner")
    model.train()
    assert quantized(model, x) == 1
    assert not model.inner._forward_hooks
    assert not model.inner._forward_pre_hooks


def test_compiled_a_module_inside_that_is_left_out_stays_so(x):
    model = dropit.to_dropit(Outer(), compress="int8", gamma=0.0, filter_fn=lambda module, fqn: fqn != "inner")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)  # so that its input is not saved
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = dropit.from_dropit(copy.deepcopy(model))
    assert (step(compiled, x)[1] - step(plain, x)[1]).norm() == 0


def test_keys_and_values_in_other_groups_with_dropout():
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)

    q, k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (6, 2, 3))
    results = []
    for module in (Attend(), dropit.to_dropit(nn.Sequential(Attend(), nn.Linear(1, 1)), gamma=0.0, compress="int8")[0]):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(module(q, k, v).square().sum(), (q, k, v)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


class Adapted(nn.Module):
    """A Linear that is frozen, with an adapter of low rank (Hu et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


class FrozenNorm(nn.Module):
    """A hand-written RMSNorm that is frozen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64), requires_grad=False)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Adapters(nn.Module):
    """Queries, keys and values of one normalized input."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v = FrozenNorm(), Adapted(), Adapted(), Adapted()

    def forward(self, x):
        x = self.norm(x)
        return self.q(x) + self.k(x) + self.v(x)


def test_adapters_of_a_frozen_model_share_what_its_norm_saves():
    torch.manual_seed(0)
    plain, x = Adapters(), torch.randn(128, 64, requires_grad=True)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0, compress="int8")
    n, rows = x.numel(), 128
    codes = n + n // 16  # with their scales
    low_rank = 3 * (4 * rows + 4 * rows // 16)
    assert held(ours, x).total_bytes == codes + low_rank + 4 * rows  # and 1 / deviation of each row
    lossless = dropit.to_dropit(copy.deepcopy(plain), gamma=0)
    assert held(lossless, x).total_bytes == held(plain, x).total_bytes
    assert (step(ours, x)[1] - step(plain, x)[1]).norm() < 1e-2 * step(plain, x)[1].norm()


@pytest.mark.parametrize("name", ["plain", "saver", "strategy"])
def test_a_submodule_may_have_a_name_that_dropit_shows(name, x):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Linear(64, 64))

        def forward(self, x):
            return torch.sigmoid(getattr(self, name)(x))

    plain = Named()
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0)
    assert type(ours).plain is Named
    assert isinstance(getattr(ours, name), nn.Linear)
    assert all(map(torch.equal, step(ours, x), step(plain, x)))
