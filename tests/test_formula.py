"""What six converted networks hold, operator by operator, against arithmetic on the shapes that their layers see."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

import dropit
from dropit.layers import plain_type
from dropit.training.model.architectures import build_model

GAMMA, BLOCK = 0.9, 256


def vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=10)


def convnext():
    return torchvision.models.convnext_tiny(num_classes=10, stochastic_depth_prob=0.0)


NETS = {
    "resnet18": (lambda: build_model("resnet18", 10, 32, stem="cifar"), 32),
    "resnet50": (lambda: build_model("resnet50", 10, 64), 64),
    "vgg11_bn": (lambda: build_model("vgg11_bn", 10, 32), 32),
    "mobilenet_v2": (lambda: build_model("mobilenet_v2", 10, 64), 64),
    "convnext_tiny": (convnext, 64),
    "vit": (vit, 32),
}


def packed(x):
    """Values in float32, and the smaller of bits and offsets; every block of 256 rounds for itself."""
    n = x.numel()
    if n == 0:
        return 0
    blocks = n > 16384
    sizes = [BLOCK] * (n // BLOCK) + [n % BLOCK] * (n % BLOCK > 0) if blocks else [n]
    kept = sum(max(1, round(size * (1 - GAMMA))) for size in sizes)
    counts = 0 if blocks else 2 * math.ceil(n / 256)
    return min(4 * kept + min(math.ceil(n / 8), counts + kept), 4 * n)


def attention(x, y):
    """The projected q, k and v, and the output with a logarithm for each row of it."""
    samples, length, width = x.shape
    return 4 * (4 * samples * length * width + 4 * samples * length)


# Of each plain type, by operator: the bytes held, from its input and output.
HELD = {
    nn.Conv2d: {"DropITConv": lambda x, y: packed(x)},
    nn.Linear: {"DropITLinear": lambda x, y: packed(x)},
    nn.ReLU: {"DropITReLU": lambda x, y: math.ceil(y.numel() / 8)},
    nn.ReLU6: {"DropITReLU": lambda x, y: math.ceil(y.numel() / 8)},
    nn.Dropout: {"DropITDropout": lambda x, y: math.ceil(y.numel() / 8)},
    nn.MaxPool2d: {"DropITMaxPool": lambda x, y: y.numel() / 2},  # of 4 or 9 places, see below
    nn.BatchNorm2d: {"NativeBatchNorm": lambda x, y: 4 * (x.numel() + 2 * x.shape[1])},
    nn.LayerNorm: {"NativeLayerNorm": lambda x, y: 4 * (x.numel() + 2 * x.numel() // x.shape[-1])},
    torchvision.models.convnext.LayerNorm2d: {
        "NativeLayerNorm": lambda x, y: 4 * (x.numel() + 2 * x.numel() // x.shape[1])
    },
    torchvision.models.convnext.CNBlock: {"Mul": lambda x, y: 4 * y.numel()},  # what layer_scale multiplies
    nn.GELU: {"Gelu": lambda x, y: 4 * x.numel()},
    nn.MultiheadAttention: {
        "DropITLinear": lambda x, y: packed(x),
        "ScaledDotProductFlashAttentionForCpu": attention,
    },
}


def by_formula(model, images):
    """Bytes by operator. An input that several layers read counts once; one that is never changed is one tensor."""
    sums, seen, alive = {}, set(), []

    def count(module, args, output):
        x, y = args[0], output[0] if isinstance(output, tuple) else output
        for operator, held in HELD.get(plain_type(module), {}).items():
            key = (id(x), versions.get(module, x._version), operator)
            if operator in {"DropITConv", "DropITLinear"} and key in seen:
                continue
            seen.add(key)
            alive.append(x)
            sums[operator] = sums.get(operator, 0) + held(x, y)

    versions = {}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0:
            continue
        handles.append(module.register_forward_pre_hook(lambda m, args: versions.update({m: args[0]._version})))
        handles.append(module.register_forward_hook(count))
    model(images)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", NETS)
def test_bytes_by_operator_are_those_of_the_formula(name):
    make, size = NETS[name]
    torch.manual_seed(0)
    model = dropit.to_dropit(make().train(), gamma=GAMMA)
    images = torch.randn(4, 3, size, size)
    expected = by_formula(model, images)
    if name == "vgg11_bn":
        expected["DropITMaxPool"] /= 2  # windows of 4 take 2 bits
    with dropit.CacheMeter(model) as meter:
        y = model(images)
    measured = {}
    for operator, nbytes in meter.by_operator().items():
        # What attention holds of its output is out_proj's input as well.
        operator = operator.removeprefix("Addmm + ")
        measured[operator] = measured.get(operator, 0) + nbytes
    assert measured.keys() == expected.keys()
    for operator in expected:
        assert measured[operator] == pytest.approx(expected[operator], rel=0.02), operator
    assert meter.total_bytes == pytest.approx(sum(expected.values()), rel=0.02)
    del y


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_hung_on_a_node_past_the_hooks(name):
    make, size = NETS[name]
    model = dropit.to_dropit(make().train(), gamma=GAMMA)
    pending, seen = [model(torch.randn(2, 3, size, size)).grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
        hung = [leaf for leaf in tree_leaves(getattr(node, "__dict__", {})) if isinstance(leaf, torch.Tensor)]
        # But for what has no element, and leads to the input's graph for second derivatives.
        assert not sum(tensor.untyped_storage().nbytes() for tensor in hung), node.name()
    assert any("DropIT" in node.name() for node in seen)
