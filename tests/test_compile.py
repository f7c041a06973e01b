"""Compiled models, over batches of several sizes: no break, as many graphs as plain, gradients as without compiling."""

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import dropit

SIZES = (8, 8, 11, 13)  # the second with new tensors of the same sizes
SETTINGS = {"lossless": {"gamma": 0.9}, "int8": {"gamma": 0.0, "compress": "int8"}}
ALL = SETTINGS | {name: {"gamma": 0.0, "compress": name} for name in ("int16", "int4", "int2")}


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


class Attention(nn.Module):
    """Calls attention as a function."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale
        self.together, self.project = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.together(x).chunk(3, -1))
        return self.project(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class AttentionOfOne(nn.Module):
    """Gives attention one tensor as queries, keys and values."""

    def forward(self, x):
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class SelfAttention(nn.Module):
    def __init__(self, need_weights, dropout=0.0):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(32, 4, dropout, batch_first=True), need_weights

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
    "padded convolution": (
        lambda: seq(nn.Conv2d(8, 8, 2, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
        lambda samples: torch.randn(samples, 8, 8, 8),
    ),
    # Of what is transposed, as an encoder layer drops from: random numbers come in another order there.
    "dropout": (lambda: seq(nn.Linear(32, 32), Transposed(), nn.Dropout(0.5)), tokens),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), tokens),
    "attention with weights": (lambda: seq(nn.Linear(32, 32), SelfAttention(True)), tokens),
    "attention": (lambda: seq(nn.Linear(32, 32), SelfAttention(False)), tokens),
    "functional attention": (lambda: seq(nn.Linear(32, 32), Attention()), tokens),
    "functional attention of one tensor": (lambda: seq(nn.Linear(32, 32), AttentionOfOne()), tokens),
}


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 50}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **dropouts, use_cache=False)
    model = transformers.GPT2Model(config)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(inputs_embeds=x).last_hidden_state

    return Hidden()


def vit():
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes)


def convnext():
    setting = torchvision.models.convnext.CNBlockConfig
    blocks = [setting(16, 32, 1), setting(32, None, 1)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=0.0, num_classes=10)


def resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def pictures(samples):
    return torch.randn(samples, 3, 32, 32)


MODELS = {
    "resnet": (resnet, pictures),
    "vit": (vit, pictures),
    "convnext": (convnext, pictures),
    "gpt2": (gpt2, tokens),
}


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def graphs_of_plain(make, batch, sizes=SIZES):
    """How many the plain model takes."""
    fresh_compiler()
    compiled = torch.compile(make(), backend="eager", fullgraph=True)
    for samples in sizes:
        compiled(batch(samples))
    return graphs()


def assert_same_gradients(compiled, eager, x, tolerance):
    got, expected = gradients(compiled, x), gradients(eager, x)
    scale = max(grad.norm() for grad in expected if grad is not None)
    for ours, exact in zip(got, expected, strict=True):
        assert (ours is None) == (exact is None)
        assert exact is None or (ours - exact).norm() <= tolerance * exact.norm() + 1e-5 * scale


@pytest.fixture
def _random_as_eager():
    """Inductor draws eager code's random numbers."""
    with inductor.patch(fallback_random=True):
        yield


def check(make, batch, options, backend, tolerance, sizes=SIZES):
    """Compare compiled steps with eager ones, and the number of graphs with plain's. Returns the compiled model."""
    allowed = graphs_of_plain(make, batch, sizes)
    fresh_compiler()
    model = dropit.to_dropit(make(), **options)
    eager, compiled = copy.deepcopy(model), torch.compile(model, backend=backend, fullgraph=True)
    for samples in sizes:
        assert_same_gradients(compiled, eager, batch(samples), tolerance)
    assert graphs() <= allowed
    return model, compiled


def bytes_held(model, forward, x):
    with dropit.CacheMeter(model) as meter:
        y = forward(x)
    assert y is not None
    return meter.total_bytes


# What is compiled by default: of each family the setting in which most of it is DropIT's own.
DROPPED = (
    "linear, ReLU",
    "transposed convolution, average pool",
    "padded convolution",
    "dropout",
    "attention with weights",
)
DEFAULT = {(name, "lossless" if name in DROPPED else "int8") for name in FAMILIES} | {("encoder layer", "lossless")}
INDUCTOR = {("linear, ReLU", "lossless"), ("layer norm, GELU", "int8")}


def every(names, settings=tuple(ALL)):
    return [(name, setting) for name in names for setting in settings]


@pytest.mark.usefixtures("_random_as_eager")
@pytest.mark.parametrize(("name", "setting"), [case if case in DEFAULT else slow(*case) for case in every(FAMILIES)])
def test_each_family_of_layers(name, setting):
    check(*FAMILIES[name], ALL[setting], "aot_eager", 1e-4)


@pytest.mark.usefixtures("_random_as_eager")
@pytest.mark.parametrize(
    ("name", "setting"),
    [case if case in INDUCTOR else slow(*case) for case in every(FAMILIES, ("int8",)) + every(DROPPED, ("lossless",))],
)
def test_each_family_of_layers_by_inductor(name, setting):
    # With another rounding, a value between two steps of a quantized tensor may go to the other one.
    check(*FAMILIES[name], ALL[setting], "inductor", 2e-2)


COMPACT = ("convolution, batch norm, pool", "layer norm, GELU", "attention", "linear, ReLU")
NARROW = ("int8", "int16", "int4", "int2")
HALF = {("convolution, batch norm, pool", "int8"), ("layer norm, GELU", "int4")}


@pytest.mark.usefixtures("_random_as_eager")
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)])
@pytest.mark.parametrize(
    ("name", "setting"), [case if case in HALF else slow(*case) for case in every(COMPACT, NARROW)]
)
def test_what_is_narrow_is_saved_and_not_what_it_becomes(name, setting, dtype):
    make, batch = FAMILIES[name]
    torch._dynamo.reset()
    model = dropit.to_dropit(make(), **ALL[setting])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batch(13)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        assert bytes_held(model, compiled, x) <= bytes_held(model, model, x)


WHOLE = [(name, "int8", backend) for name in MODELS for backend in ("aot_eager", "inductor")]
WHOLE += [
    (name, setting, "aot_eager") for name in ("resnet", "gpt2") for setting in ("lossless", "int16", "int4", "int2")
]


@pytest.mark.slow
@pytest.mark.usefixtures("_random_as_eager")
@pytest.mark.parametrize(("name", "setting", "backend"), WHOLE)
def test_whole_models_at_any_batch_size_hold_no_more_than_eager_ones(name, setting, backend):
    make, batch = MODELS[name]
    tolerance = 1e-3 if backend == "aot_eager" else 3e-2
    model, compiled = check(make, batch, ALL[setting], backend, tolerance)
    # Compiling adds what has nothing to do with us: to a plain model too, a copy of each batch statistic and
    # attention's mask, and with inductor on a CPU one of each convolution's weight in another layout.
    x, plain = batch(SIZES[-1]), make()
    compiled_plain = torch.compile(plain, backend=backend)
    for samples in SIZES[1:]:
        compiled_bytes = bytes_held(plain, compiled_plain, batch(samples))
    added = compiled_bytes - bytes_held(plain, plain, x)
    copies = sum(p.nbytes for p in plain.parameters() if p.dim() == 4) if backend == "inductor" else 0
    masks = 9 * 9 * SIZES[-1] if name == "gpt2" else 0
    ours = bytes_held(model, compiled, x)
    assert ours <= bytes_held(model, model, x) + max(masks, added, copies)
    assert ours < compiled_bytes


@pytest.mark.parametrize("strategy", ["fastmink", "mink_c", "random", slow("mink"), slow("random_c")])
def test_models_with_other_gammas(strategy):
    fresh_compiler()
    for count, gamma in enumerate((0.9, 0.5, 0.8)):
        model = dropit.to_dropit(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 8)), strategy, gamma)
        eager, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
        for samples in (8, 11, 13):
            x = torch.randn(samples, 256)
            got, exact = gradients(compiled, x), gradients(eager, x)
            # Of random choices, compiled ones are PyTorch's. Whatever is dropped, biases' gradients are exact.
            same = slice(None, None, 2) if strategy in {"random", "random_c"} else slice(None)
            for ours, expected in zip(got[same], exact[same], strict=True):
                torch.testing.assert_close(ours, expected)
        assert graphs() <= 2 + count


OTHER_SETTINGS = {
    "bounds": (lambda a: seq(nn.Linear(32, 32), nn.Hardtanh(-a, a), nn.LeakyReLU(a)), tokens),
    "eps": (lambda a: seq(nn.Linear(32, 32), nn.LayerNorm(32, a), nn.RMSNorm(32, a)), tokens),
    "momentum": (lambda a: seq(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, a, a)), images),
    "dropout": (lambda a: seq(SelfAttention(True, a), nn.Linear(32, 32), nn.Dropout(a)), tokens),
    "scale": (lambda a: Attention(a), tokens),
    "kernel": (lambda a: seq(nn.Conv2d(8, 8, round(2 + a)), nn.MaxPool2d(round(2 + a))), images),
}


@pytest.mark.usefixtures("_random_as_eager")
@pytest.mark.parametrize("name", [name if name in {"bounds", "eps"} else slow(name) for name in OTHER_SETTINGS])
def test_models_with_other_settings(name):
    make, batch = OTHER_SETTINGS[name]
    fresh_compiler()
    for setting in (0.1, 0.6):
        model = dropit.to_dropit(make(setting), **SETTINGS["int8"])
        eager, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
        for samples in (8, 11):
            assert_same_gradients(compiled, eager, batch(samples), 1e-4)


@pytest.mark.parametrize("strategy", ["random", slow("random_c")])
def test_random_strategies_with_a_seed_draw_pytorchs_numbers(strategy):
    fresh_compiler()
    model = dropit.to_dropit(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), strategy, seed=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for samples in (8, 11):
        x = tokens(samples)
        first, second = gradients(compiled, x), gradients(compiled, x)  # each from the same seed of PyTorch's
        assert all(map(torch.equal, first, second))
    assert graphs() == 2


def test_stochastic_rounding():
    fresh_compiler()
    plain = seq(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8))
    ours = dropit.to_dropit(copy.deepcopy(plain), gamma=0.0, compress="int8", stochastic=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for samples in (8, 11, 13):
        assert_same_gradients(compiled, plain, tokens(samples), 3e-2)
    assert graphs() == 2


@pytest.mark.usefixtures("_random_as_eager")
def test_whether_a_tensor_ends_in_a_whole_block_takes_no_graph_of_its_own():
    # 64 rows of 300 elements make whole blocks of 256, 60 and 61 do not.
    sizes = (60, 61, 64)
    check(lambda: nn.Linear(300, 8), lambda samples: torch.randn(samples, 300), {"gamma": 0.5}, "aot_eager", 0, sizes)


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
