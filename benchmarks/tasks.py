"""What the benchmarks train: models, random batches of any size for them, and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dropit
from dropit.training.model.architectures import build_model

MIB = 2**20


class Task(NamedTuple):
    """``batch(n)`` gives the inputs and labels of n samples; ``cpu_batch`` and ``gpu_batch`` are what a step takes."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    cpu_batch: int
    gpu_batch: int

    def step_batch(self, device: str) -> int:
        """Samples in a step on ``device``."""
        return self.gpu_batch if device == "cuda" else self.cpu_batch


def images(size: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random images and labels."""
    return lambda n: (torch.randn(n, 3, size, size), torch.randint(classes, (n,)))


def tokens(length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random tokens of GPT-2's vocabulary, and what follows each."""
    return lambda n: (torch.randint(50257, (n, length)), torch.randint(50257, (n, length)))


def vit() -> nn.Module:
    """torchvision's ViT-B/16, but for its head, whose zeros would let no gradient through."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def gpt2() -> nn.Module:
    """Hugging Face's GPT-2 small."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))


TASKS = {
    "resnet18_cifar": Task(
        "ResNet-18, CIFAR stem, 32 x 32",
        lambda: build_model("resnet18", 1000, 32, stem="cifar"),
        images(32, 1000),
        32,
        512,
    ),
    "resnet18": Task("ResNet-18, 224 x 224", torchvision.models.resnet18, images(224, 1000), 16, 256),
    "resnet50": Task("ResNet-50, 224 x 224", torchvision.models.resnet50, images(224, 1000), 4, 128),
    "convnext_tiny": Task("ConvNeXt-T, 224 x 224", torchvision.models.convnext_tiny, images(224, 1000), 4, 128),
    "vit_b_16": Task("ViT-B/16, 224 x 224", vit, images(224, 1000), 4, 128),
    "gpt2": Task("GPT-2, 256 tokens", gpt2, tokens(256), 2, 32),
}


def logits(output: Any) -> Tensor:
    """Of what a model returns."""
    return output if isinstance(output, Tensor) else output.logits


def criterion(output: Any, labels: Tensor) -> Tensor:
    """Cross entropy, of each sample or token, of what a model returns."""
    return cross_entropy(logits(output).flatten(0, -2), labels.flatten())


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits."""
    return logits(model(inputs))


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The criterion of the model's output."""
    return criterion(model(inputs), labels)


def without_noise(model: nn.Module) -> nn.Module:
    """Take dropout and stochastic depth out, so that two runs differ in nothing else. Returns the model."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return model


def without_zeros(model: nn.Module) -> nn.Module:
    """Draw anew what begins at zero or next to it, as some heads and gains do, which would let no gradient through.

    Biases stay. Returns the model.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.detach().abs().max() < 1e-4:
            nn.init.normal_(parameter, std=0.1)
    return model


def cache_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that what ``run`` computes with ``model`` saves for backward, its result alone alive."""
    with dropit.CacheMeter(model, retain=False) as meter:
        result = run()
    del result
    return meter.total_bytes
