"""Train fake tensors, as on a GPU, and print which operators would have the host wait for one.

A program of its own: in the tests' process Triton interprets its kernels, which needs elements.

Where the values decide a shape or a branch, fake tensors raise. What would run on a GPU is chosen as there: the
operators of the kernels, and none of the looks at elements that are free on a CPU. Autograd's engine needs a driver for
tensors on a GPU, so that these run forward only.
"""

import json
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dropit
from dropit import ops


class Calls(nn.Module):
    """A module whose own code calls functions."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.mixed = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x, y = self.left(x), self.right(x)
        weights = torch.softmax(torch.einsum("bij,bkj->bik", x, y), dim=-1)
        z = torch.baddbmm(x, weights, y) * F.silu(x) + F.leaky_relu(y) * x.pow(2)
        z = F.normalize(z, dim=-1) + F.scaled_dot_product_attention(x, y, z) / z.norm(dim=-1, keepdim=True)
        decay = torch.exp(-F.softplus(x.mean(dim=-1, keepdim=True)) * torch.sigmoid(y[:1, :1]))
        z = z + decay[:, :8].repeat(1, 2, 1) * F.rms_norm(y, (32,))
        return self.mixed(F.glu(torch.cat([z, F.hardtanh(x)], dim=-1)))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.GroupNorm(4, 16),
        nn.Hardswish(),
        nn.Dropout(0.1),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(16, 8, 2),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.LayerNorm(64),
        nn.LeakyReLU(),
        nn.Linear(64, 8),
        nn.Tanh(),
        nn.AdaptiveAvgPool1d(4),
    )


FAMILIES = {
    "convolutions": (convolutions, (4, 8, 16, 16)),
    # Without dropout, for which attention reads the state of a GPU's generator: that needs a driver.
    "transformer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), (4, 10, 32)),
    "functions": (Calls, (4, 16, 32)),
}
SETTINGS = [
    *(
        {"compress": compress, "gamma": gamma}
        for compress in ("lossless", "int16", "int8", "int4", "int2")
        for gamma in (0, 0.9)
    ),
    *({"compress": "int8", "gamma": 0.9, "value_dtype": value_dtype} for value_dtype in ("int8", "bf16")),
    {"compress": "int4", "gamma": 0, "stochastic": True},
]


class Waits(TorchDispatchMode):
    """Notes the operators that wait for the device: for an element, a shape, or a copy to the host."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.seen[name] += 1
        # A shape that is known is not waited for; what is filled with the elements of a list is copied from the host.
        if any(
            part in name for part in ("_local_scalar_dense", "aten.nonzero.", "masked_select", "is_nonzero", "unique")
        ):
            self.found.add(name)
        output = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in given) and any(
            isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves(output)
        ):
            self.found.add(f"{name} to the host")
        return output


def are_dense(*values):
    """As the function of that name, of fake tensors too."""
    known = (torch.Tensor, nn.Parameter, FakeTensor)
    return all(type(x) in known and x.is_floating_point() and not x.is_nested for x in values)


def train(family, strategy, device, settings):
    """Return what a training step dispatched; on a GPU only its forward pass."""
    build, shape = FAMILIES[family]
    with FakeTensorMode():
        with torch.device(device):
            model, x = build(), torch.randn(shape)
        dropit.to_dropit(model, strategy, **settings)
        with Waits() as waits:
            y = model(x.requires_grad_())
            if device == "cpu":
                y.sum().backward()
    return waits


def cases():
    """Yield family, strategy, device and settings."""
    for family in FAMILIES:
        for strategy in dropit.STRATEGIES:
            yield from ((family, strategy, "cpu", settings) for settings in SETTINGS)
        for strategy in ("fastmink", "mink", "mink_c"):  # the others need a generator of the device
            yield from ((family, strategy, "cuda", settings) for settings in SETTINGS if settings["gamma"])


def main():
    """Print what each case has found, as JSON."""
    ops._has_kernels = lambda x: True
    for module in list(sys.modules.values()):  # which leave a class that they do not know to PyTorch
        if module.__name__.startswith("dropit.layers") and hasattr(module, "are_dense"):
            module.are_dense = are_dense
    for family in FAMILIES:  # what is computed once and kept, as bounds in a dtype, is so before
        for compress in ("lossless", "int16"):
            train(family, "fastmink", "cpu", {"compress": compress, "gamma": 0})
    found = []
    for family, strategy, device, settings in cases():
        try:
            waits = train(family, strategy, device, settings)
            result = {"waits": sorted(waits.found), "quantized": waits.seen["dropit.quantize_groups.default"]}
        except Exception as error:
            result = {"waits": [f"{type(error).__name__}: {error}"], "quantized": 0}
        found.append({"case": f"{family} {strategy} {device} {settings}", "compress": settings["compress"], **result})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
