"""Random layers, shapes, layouts, dtypes and gammas: none crashes, and each gradient is that of the masked input."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropit
from tests.layers.cases import gradients, masked

pytestmark = pytest.mark.filterwarnings("ignore:.*saves nothing", "ignore:Using padding='same' with even kernel")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
CONV = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


def random_linear(rng, dtype):
    shape = [rng.randint(1, 9) for _ in range(rng.choice([1, 2, 2, 3, 3, 4]))]
    module = nn.Linear(shape[-1], rng.randint(1, 9), bias=rng.random() < 0.7, dtype=dtype)
    return module, shape


def random_conv(rng, dtype):
    dimensions = rng.choice([1, 2, 2, 2, 3])
    transposed = rng.random() < 0.3
    groups = rng.choice([1, 1, 2, 4])
    inside, outside = groups * rng.randint(1, 3), groups * rng.randint(1, 3)

    def each(low, high):
        return tuple(rng.randint(low, high) for _ in range(dimensions))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    options = {"stride": stride, "padding": each(0, 2), "dilation": dilation, "groups": groups}
    if transposed:
        limits = zip(stride, dilation, strict=True)
        options["output_padding"] = tuple(rng.randint(0, max(s, d) - 1) for s, d in limits)
    elif rng.random() < 0.3:
        options["padding_mode"] = rng.choice(["reflect", "replicate", "circular"])
    elif rng.random() < 0.2:
        options |= {"padding": "same", "stride": 1}
    module = CONV[dimensions][transposed](inside, outside, kernel, bias=rng.random() < 0.7, dtype=dtype, **options)
    batch = [rng.randint(1, 4)] if rng.random() < 0.8 else []
    return module, [*batch, inside, *each(5, 9)]


def random_layout(rng, shape, dtype):
    """A tensor of the shape: contiguous, transposed, expanded, sliced or channels_last."""
    kind = rng.choice(["contiguous", "transposed", "expanded", "sliced", "channels_last"])
    if kind == "transposed":
        order = rng.sample(range(len(shape)), len(shape))
        return torch.randn([shape[d] for d in order], dtype=dtype).permute([order.index(d) for d in range(len(shape))])
    if kind == "expanded":
        return torch.randn([1, *shape[1:]], dtype=dtype).expand(shape)
    if kind == "sliced":
        return torch.randn([2 * n for n in shape], dtype=dtype)[(slice(None, None, 2),) * len(shape)]
    if kind == "channels_last" and len(shape) == 4:
        return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    return torch.randn(shape, dtype=dtype)


def random_strategy(rng):
    gamma = rng.choice([0.0, 0.1, 0.5, 0.8, 0.9, 0.99, rng.random()])
    name = rng.choice(["fastmink", *dropit.STRATEGIES])
    options = {"seed": 3} if "random" in name else {}
    if name == "fastmink":
        options["block_size"] = rng.choice([7, 64, 256, None])
    if not name.endswith("_c"):
        options["per_sample"] = rng.random() < 0.3
    options["value_dtype"] = rng.choice([None, None, None, "bf16", "int8"])
    return {"strategy": name, "gamma": gamma, **options}


def check(case):
    rng = random.Random(case)
    torch.manual_seed(case)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    plain, shape = (random_linear if rng.random() < 0.4 else random_conv)(rng, dtype)
    arguments = random_strategy(rng)
    ours = dropit.to_dropit(copy.deepcopy(plain), **arguments)
    x = random_layout(rng, shape, dtype).requires_grad_()

    # The inputs as the two backward passes see them: a copy of the strategy makes the same choice once more.
    saver = copy.deepcopy(ours.saver)
    y = ours(x)
    exact = plain(x)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y, exact, **close)

    grad_output = random_layout(rng, list(y.shape), dtype)
    inputs = [x, *ours.parameters()]
    got = gradients(y, grad_output, inputs)
    true = gradients(exact, grad_output, [x, *plain.parameters()])
    for index in range(len(inputs)):
        if index != 1:
            torch.testing.assert_close(got[index], true[index], **close)
    by_hand = gradients(after_padding(ours, plain, x, saver), grad_output, [plain.weight])[0]
    scale = max(1.0, by_hand.abs().max().item())  # sums of many products: the error grows with them
    torch.testing.assert_close(got[1] / scale, by_hand / scale, **close)


def after_padding(ours, plain, x, saver):
    """The plain layer's output of the masked input; where padding is a step of its own, it comes before the mask."""
    x = x.detach()
    if isinstance(plain, nn.Linear):
        return plain(masked(saver, x))
    seen, rest = ours._pad(x, ours.weight) if hasattr(ours, "_pad") else (x, None)
    batched = seen if x.dim() == plain.weight.dim() else seen.unsqueeze(0)
    kept = masked(saver, batched, channel_dim=1)
    if seen is x:
        y = plain(kept)
    else:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(ours.stride)]
        y = conv(kept, plain.weight, plain.bias, plain.stride, rest, plain.dilation, plain.groups)
    return y if x.dim() == plain.weight.dim() else y.squeeze(0)


@pytest.mark.parametrize("first", range(0, 500, 50))
def test_five_hundred_random_layers(first):
    for case in range(first, first + 50):
        check(case)


@pytest.mark.slow
def test_a_thousand_random_layers():
    for case in range(500, 1500):
        check(case)


def test_forty_random_layers_pass_gradcheck_at_gamma_zero():
    for case in range(40):
        rng = random.Random(case)
        torch.manual_seed(case)
        plain, shape = (random_linear if case % 2 else random_conv)(rng, torch.float64)
        ours = dropit.to_dropit(plain, gamma=0.0)
        x = random_layout(rng, shape, torch.float64)
        x = (x.contiguous() if 0 in x.stride() else x).requires_grad_()  # gradcheck takes none that overlaps
        names = [name for name, _ in ours.named_parameters()]

        def output(x, *parameters, ours=ours, names=names):
            return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

        assert torch.autograd.gradcheck(output, (x, *ours.parameters()), fast_mode=True)
