"""Functions that a module's own code calls: the outputs are plain PyTorch's, and the gradients to within rounding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropit
from dropit.layers.functions import FUNCTIONS, calls_functions


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(5)))


def recurrence(decay, x):
    """state = decay * state + x, step by step, as the reference implementations of state-space models have it."""
    state = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        state = decay[:, step] * state + x[:, step]
    return state


# By name: a function of two tensors (8, 16, 32) that require a gradient, and of a parameter (32,).
CALLS = {
    "mul": lambda x, y, w: x * y,
    "mul, function": lambda x, y, w: torch.mul(x, y),
    "mul by a parameter": lambda x, y, w: w * x,
    "mul, broadcast": lambda x, y, w: x * y.mean(dim=-1, keepdim=True),
    "mul by a number": lambda x, y, w: (3 * x) * y,
    "mul by itself": lambda x, y, w: x * x,
    "div": lambda x, y, w: x / (y.square() + 1),
    "div, small": lambda x, y, w: x.div(w.square() + 1),
    "addcmul": lambda x, y, w: torch.addcmul(w, x, y),
    "addcmul, deprecated": lambda x, y, w: torch.addcmul(w, 0.5, x, y),
    "dropout, by other names": lambda x, y, w: torch.dropout(input=x, p=0.0, train=True) * y,
    "addmm, deprecated": lambda x, y, w: torch.addmm(0.5, w[:16], 2.0, x[0], y[0].t()),
    "matmul": lambda x, y, w: x @ y.transpose(1, 2),
    "matmul, broadcast": lambda x, y, w: x @ y[0].t(),
    "matmul, changed in place": lambda x, y, w: (x @ y[0].t()).add_(1),
    "mul, changed in place": lambda x, y, w: (x * y).add_(1),
    "bmm": lambda x, y, w: torch.bmm(x, y.transpose(1, 2)),
    "mm": lambda x, y, w: torch.mm(x[0], y[0].t()),
    "baddbmm": lambda x, y, w: torch.baddbmm(w[:16], x, y.transpose(1, 2)),
    "addmm": lambda x, y, w: torch.addmm(w[:16], x[0], y[0].t()),
    "baddbmm, weighted": lambda x, y, w: torch.baddbmm(w[:16], batch1=x, batch2=y.mT, beta=0.5, alpha=2.0),
    "bilinear": lambda x, y, w: F.bilinear(x, y, w.outer(w).expand(4, 32, 32).to(x), w[:4].to(x)),
    "einsum": lambda x, y, w: torch.einsum("bik,bjk->bij", x, y),
    "einsum, outer": lambda x, y, w: torch.einsum("bij,j->bij", x, w.to(x.dtype)) * torch.einsum("bij,bij->bij", y, y),
    "einsum, summed": lambda x, y, w: torch.einsum("bik, ikj -> bij", x, y.permute(1, 2, 0)),
    "pow": lambda x, y, w: x**2 + y.pow(3),
    "exp": lambda x, y, w: torch.exp(-x.mean(dim=-1, keepdim=True).square() * w.square()) * y,
    "recurrence": lambda x, y, w: recurrence(torch.exp(-x.square().mean(dim=-1, keepdim=True) * w), y),
    "exp, saved": lambda x, y, w: torch.exp(x) + y.exp(),
    "square": lambda x, y, w: x.square() + torch.square(y),
    "softplus": lambda x, y, w: F.softplus(x + y),
    "glu": lambda x, y, w: F.glu(x, dim=1) + F.glu(y, 1),
    "softmax": lambda x, y, w: F.softmax(x, dim=-1) * torch.softmax(y, 1),
    "softmax, method": lambda x, y, w: (x * 4).softmax(-1).matmul(y.transpose(1, 2)),
    "norm": lambda x, y, w: x.norm(dim=-1) + torch.linalg.vector_norm(y, dim=2),
    "norm, kept": lambda x, y, w: x / x.norm(p=2, dim=(1, 2), keepdim=True),
    "linalg.norm": lambda x, y, w: torch.linalg.norm(x, dim=-1) + torch.linalg.norm(y, 2, -1),
    "linalg.norm, of all": lambda x, y, w: torch.linalg.norm(x, dim=(1, 2)) + y.norm(2, dim=(1, 2)),
    "normalize": lambda x, y, w: F.normalize(x, dim=-1) + F.normalize(y, dim=1),
    "relu": lambda x, y, w: F.relu(x) + torch.relu(y) + x.relu(),
    "relu, in place": lambda x, y, w: F.relu(x + y, inplace=True) + (x - y).relu_(),
    "relu6": lambda x, y, w: F.relu6(4 * x),
    "leaky_relu": lambda x, y, w: F.leaky_relu(x, 0.2) + F.leaky_relu(y),
    "gelu": lambda x, y, w: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "silu": lambda x, y, w: F.silu(x) + F.silu(x + y, inplace=True),
    "mish": lambda x, y, w: F.mish(x),
    "hardswish": lambda x, y, w: F.hardswish(x),
    "sigmoid": lambda x, y, w: torch.sigmoid(x) + y.sigmoid() + F.sigmoid(x + y),
    "tanh": lambda x, y, w: torch.tanh(x) + y.tanh(),
    "dropout": lambda x, y, w: F.dropout(x, 0.3, training=True) + F.dropout(y),
    "linear": lambda x, y, w: F.linear(x, torch.diag(w), -w),
    "conv1d": lambda x, y, w: F.conv1d(x, w.view(1, 1, 32).expand(4, 16, 32)[..., :3], stride=2, padding=1),
    "conv2d": lambda x, y, w: F.conv2d(x.unsqueeze(1), w[:18].view(2, 1, 3, 3), w[:2], padding=1),
    "layer_norm": lambda x, y, w: F.layer_norm(x, (32,), w, -w) + F.layer_norm(y, [32]),
    "rms_norm": lambda x, y, w: F.rms_norm(x, (32,), w) + F.rms_norm(y, [32], eps=1e-3),
    "group_norm": lambda x, y, w: F.group_norm(x, 4, w[:16], w[16:]) + F.group_norm(y, 2),
    "batch_norm": lambda x, y, w: F.batch_norm(x, None, None, w[:16], w[16:], training=True),
    "max_pool": lambda x, y, w: F.max_pool1d(x, 2) + F.max_pool2d(y, (1, 2)),
    "avg_pool": lambda x, y, w: F.avg_pool1d(x, 2) + F.avg_pool2d(y, (1, 2)),
    "attention": lambda x, y, w: F.scaled_dot_product_attention(*(t.view(8, 4, 4, 32) for t in (x, y, x + y))),
    "attention with a bias": lambda x, y, w: F.scaled_dot_product_attention(x, y, x + y, w[:16] * w[16:, None]),
}
LOSSLESS = {"relu", "relu, in place", "relu6", "leaky_relu", "dropout", "max_pool", "avg_pool"}


class Calling(nn.Module):
    """A module whose own code calls a function of what two layers compute."""

    def __init__(self, name):
        super().__init__()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)
        self.weight, self.name = parameter(32), name

    def forward(self, x):
        return CALLS[self.name](self.left(x), self.right(x), self.weight) * 1  # the sign has it converted


def step(model, x, autocast=False):
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.double() + torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **grads}


def held(model, x):
    with dropit.CacheMeter(model) as meter:
        y = model(x)
    del y
    return meter


def pair(name, compress, dtype=torch.float32):
    torch.manual_seed(0)
    plain = Calling(name).to(dtype)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress=compress)
    assert type(ours) is not Calling
    return plain, ours


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compress", ["lossless", "int16"])
@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_equal_and_gradients_close(name, compress, dtype, autocast):
    plain, ours = pair(name, compress, dtype)
    x = torch.randn(8, 16, 32, dtype=dtype)
    (y, exact), (our_y, grads) = step(plain, x, autocast), step(ours, x, autocast)
    assert torch.equal(y, our_y)
    assert y.dtype == our_y.dtype
    assert grads.keys() == exact.keys()
    for key, grad in grads.items():
        assert (grad.dtype, grad.shape) == (exact[key].dtype, exact[key].shape)
        tolerance = 0.0 if compress == "lossless" else 1e-3 if dtype.itemsize > 2 and not autocast else 5e-2
        scale = max(exact[key].double().norm(), 1e-1 * exact["x"].double().norm())  # some vanish but for rounding
        assert (grad.double() - exact[key].double()).norm() <= tolerance * scale, key


@pytest.mark.parametrize("order", [2, -2, 1, "nuc", "fro"])
def test_norms_of_matrices_are_pytorchs(order):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return torch.linalg.norm(self.linear(x), order, (1, 2))

    plain, x = Norm(), torch.randn(2, 16, 32)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0, compress="int16")
    assert torch.equal(ours(x), plain(x))
    grads = []
    for model in (plain, ours):
        model(x).sum().backward()
        grads.append(model.linear.weight.grad)
    assert (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


LEFT = ("addcmul, deprecated", "addmm, deprecated", "exp, saved")  # to PyTorch


@pytest.mark.parametrize("name", [name for name in CALLS if name != "div" and name not in LEFT])
def test_in_eight_bits_two_fifths_are_held_at_most(name):
    plain, ours = pair(name, "int8")
    x = torch.randn(8, 16, 32)
    own = {model: held(model, x).by_module().get("", 0) for model in (plain, ours)}
    assert own[ours] <= 0.42 * own[plain]


HOSTILE = {
    "zeros": lambda x: x * 0,
    "signed zeros": lambda x: x.sign() * 0.0,
    "an infinity": lambda x: x.index_fill(0, torch.tensor(0), -math.inf),
    "a NaN": lambda x: x.masked_fill(x > 3, math.nan),
    "denormal": lambda x: x * 1e-40,
    "huge ranges": lambda x: x * torch.logspace(-20, 8, 32),
    "huge": lambda x: x * 1e30,
    "ties": lambda x: x.round(),
}


class Given(nn.Module):
    """The function of what is given."""

    def __init__(self, name):
        super().__init__()
        self.weight, self.name, self.unused = parameter(32), name, nn.Linear(1, 1)

    def forward(self, x, y):
        return CALLS[self.name](x, y, self.weight) * 1


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("values", HOSTILE)
@pytest.mark.parametrize("name", CALLS)
def test_hostile_values_change_no_output_and_make_no_gradient_infinite(name, values):
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Given(name)
        if convert:
            dropit.to_dropit(model, gamma=0.0, compress="int8")
        x, y = (HOSTILE[values](torch.randn(8, 16, 32)).requires_grad_() for _ in range(2))
        torch.manual_seed(1)
        output = model(x + 0, y + 0)
        output.sum().backward()
        results.append((output.detach(), x.grad, y.grad))
    for exact, ours in zip(*results, strict=True):
        if exact is results[0][0]:
            assert torch.equal(exact.nan_to_num(), ours.nan_to_num())
        elif exact is not None:
            assert not (exact.isfinite() & ~ours.isfinite()).any()


def test_what_a_product_reads_is_saved_once_and_gives_its_output_back():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model, x = dropit.to_dropit(Gated(), gamma=0.0, compress="int8"), torch.randn(64, 64)
    meter = held(model, x)
    codes = x.numel() * 34 // 32
    assert meter.total_bytes == 3 * codes  # the input, the gate and what it is multiplied by; nothing for down
    assert meter.by_module().get("down", 0) == 0


def test_a_hand_written_norm_saves_its_input_once():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.linear = parameter(64), nn.Linear(64, 64)

        def forward(self, x):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.linear(self.weight * x)

    torch.manual_seed(0)
    model, x = dropit.to_dropit(RMSNorm(), gamma=0.0, compress="int8"), torch.randn(64, 64, requires_grad=True)
    assert held(model, x).total_bytes == x.numel() * 34 // 32 + 64 * 4  # and 1 / deviation of each row


class Decaying(nn.Module):
    """A recurrence whose decays are exponentials of an outer product; ``between(decays)`` is called before the loop."""

    def __init__(self, between=lambda decays: decays):
        super().__init__()
        self.step, self.input, self.rate, self.between = nn.Linear(64, 16), nn.Linear(64, 16), parameter(32), between

    def forward(self, x):
        rate = -torch.exp(self.rate)
        decays = torch.exp(F.softplus(self.step(x))[..., None] * rate)  # (batch, steps, 16, 32)
        return recurrence(self.between(decays), self.input(x)[..., None].expand_as(decays)).sum()


def test_decays_of_a_recurrence_are_computed_from_what_they_are_a_product_of():
    torch.manual_seed(0)
    plain, x = Decaying(), torch.randn(4, 20, 64)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8")
    meter = held(ours, x)
    assert meter.by_operator()["DropITProduct"] == 4 * 19 * 16 * 32 * 34 // 32  # the states but for the first, 0
    assert meter.total_bytes < 0.2 * held(plain, x).total_bytes
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    for (name, exact), near in zip(step(plain, x)[1].items(), step(ours, x)[1].values(), strict=True):
        assert (near - exact).norm() <= 1e-3 * exact.norm(), name


def scaled_by_data(decays):
    decays.data.mul_(0.5)
    return decays


@pytest.mark.parametrize("between", [scaled_by_data, lambda decays: decays.clone().mul_(0.5)], ids=["data", "copy"])
def test_decays_that_were_changed_are_saved_as_they_are_read(between):
    torch.manual_seed(0)
    plain, x = Decaying(between), torch.randn(4, 20, 64)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    ours(x).backward()
    if between is scaled_by_data:  # which plain PyTorch does not notice
        plain.between = lambda decays: decays + (0.5 * decays - decays).detach()
    plain(x).backward()
    for exact, near in zip(plain.parameters(), ours.parameters(), strict=True):
        assert (near.grad - exact.grad).norm() <= 1e-3 * exact.grad.norm()


def test_it_is_left_alone_in_evaluation_without_gradients_and_under_torch_func():
    plain, ours = pair("mul", "int8")
    x = torch.randn(8, 16, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert "DropITProduct" not in held(ours.eval(), x).by_operator()
    ours.train()

    def loss(parameters):
        return torch.func.functional_call(ours, parameters, (x,)).square().mean()

    grads = torch.func.grad(loss)(dict(ours.named_parameters()))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_second_derivative_is_an_error():
    _, ours = pair("mul", "int8")
    x = torch.randn(8, 16, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


class Checkpointed(nn.Module):
    """Opens a region of activation checkpointing in its own code."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return checkpoint(lambda x: F.silu(self.linear(x)) * x, x, use_reentrant=False) * x


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(inside):
    torch.manual_seed(0)
    plain, x = Checkpointed() if inside else Calling("mul"), torch.randn(8, 16, 32)
    exact = step(plain, x)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    if not inside:
        inner = ours.forward
        ours.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    y, grads = step(ours, x)
    assert torch.equal(y, exact[0])
    for key, grad in grads.items():
        assert (grad - exact[1][key]).norm() < 1e-3 * exact[1][key].norm()


class Block(nn.Module):
    """A transformer's, written by hand: norm, attention, gated MLP."""

    def __init__(self):
        super().__init__()
        self.scale, self.qkv, self.out = parameter(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.gate, self.up, self.down = nn.Linear(64, 176), nn.Linear(64, 176), nn.Linear(176, 64)

    def forward(self, x):
        y = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


COMPILED = {"block": (Block, 64), **{name: (lambda name=name: Calling(name), 32) for name in CALLS}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in CALLS else []) for name in COMPILED]
)
def test_compiled_the_gradients_are_close_without_a_break(name):
    torch._dynamo.reset()
    make, size = COMPILED[name]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(8, 16, size)
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int16")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    (y, exact), (our_y, grads) = step(plain, x), step(compiled, x)
    if "dropout" not in name:  # whose random numbers are those of a compiled dropout
        torch.testing.assert_close(our_y, y)
        for key, grad in grads.items():
            of_it = exact[key.removeprefix("_orig_mod.")]
            assert (grad - of_it).norm() <= 1e-3 * max(of_it.norm(), 1e-1 * exact["x"].norm()), key


def helper(x):
    return F.relu(x)


class ByHelper(nn.Module):
    def forward(self, x):
        return helper(x)


class ByMethod(nn.Module):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return x.tanh()


class ByParent(ByMethod):
    def forward(self, x):
        return super().forward(x) + 1


class ByLambda(nn.Module):
    def forward(self, x):
        return (lambda y: torch.sigmoid(y))(x)


class BySign(nn.Module):
    def forward(self, x):
        return x @ x


class ByNone(nn.Module):
    """Its ``relu`` is a module."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x) + x.cumsum(0)


@pytest.mark.parametrize("kind", [ByHelper, ByMethod, ByParent, ByLambda, BySign, nn.Softmax, nn.GLU], ids=str)
def test_a_class_whose_code_leads_to_a_function_is_known(kind):
    assert calls_functions(kind)


@pytest.mark.parametrize("kind", [ByNone, nn.LSTM, nn.Sequential, nn.LazyLinear, nn.DataParallel], ids=str)
def test_a_class_that_calls_none_is_left_alone(kind):
    assert not calls_functions(kind)


def test_layers_inside_compute_without_interruption():
    """Only the module's own calls are taken."""
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append(torch._C._len_torch_function_stack())
            return super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Calling("mul"))
    model[1].left = Watching(32, 32)
    dropit.to_dropit(model, compress="int8", filter_fn=lambda module, fqn: fqn != "1.left")
    outer = torch._C._len_torch_function_stack()
    model[1](torch.randn(8, 16, 32))
    assert seen == [outer + 1]  # left out: its calls pass through
    assert torch._C._len_torch_function_stack() == outer


def test_the_names_are_of_functions_that_exist():
    assert all(isinstance(value, object) and callable(value) for value in FUNCTIONS)
    assert Tensor.mul in FUNCTIONS
    assert F.scaled_dot_product_attention in FUNCTIONS
