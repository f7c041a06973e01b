"""The models: torchvision's classifiers, two tiny ones of the same classes, and pretrained weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from dropit.training.errors import ConfigError, SetupError


def vit_tiny(num_classes: int, image_size: int) -> nn.Module:
    """A ViT of 4 layers, 96 channels and 4 x 4 patches: 0.5 M parameters."""
    return tv.VisionTransformer(  # type: ignore[no-any-return]
        image_size, image_size // 4, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=384, num_classes=num_classes
    )


def resnet_tiny(num_classes: int) -> nn.Module:
    """A ResNet of one basic block in each of four stages: 5 M parameters."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)  # type: ignore[no-any-return]


TINY: dict[str, Callable[..., nn.Module]] = {"vit_tiny": vit_tiny, "resnet_tiny": resnet_tiny}
ARCHS: tuple[str, ...] = (*TINY, *tv.list_models(module=tv))
STEMS = ("imagenet", "cifar")
# The classifier of torchvision's models, the one part that pretrained weights may not fit.
HEADS = ("fc.", "heads.", "head.", "classifier.")


def build_model(
    arch: str, num_classes: int, image_size: int = 224, *, stem: str = "imagenet", pretrained: str = ""
) -> nn.Module:
    """The model called ``arch``, from scratch or from weights by torchvision's name or in a local file."""
    options = {"image_size": image_size} if arch.startswith("vit_") else {}
    model = _builder(arch)(num_classes=num_classes, **options)
    if stem == "cifar":
        _use_cifar_stem(arch, model)
    if pretrained:
        _load_weights(model, _read_weights(arch, pretrained), pretrained)
    return model


def _builder(arch: str) -> Callable[..., nn.Module]:
    return TINY.get(arch) or tv.get_model_builder(arch)  # type: ignore[no-any-return]


def _use_cifar_stem(arch: str, model: nn.Module) -> None:
    """For images of 32 x 32: a 3x3 convolution that keeps the size, and no pooling."""
    if not isinstance(model, ResNet):
        raise ConfigError(f"MODEL.STEM cifar is for ResNets, not for {arch}")
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _read_weights(arch: str, pretrained: str) -> dict[str, Tensor]:
    names = [weights.name for weights in tv.get_model_weights(arch)] if arch not in TINY else []
    if pretrained in names:
        return _download(arch, pretrained)
    if not Path(pretrained).is_file():
        known = f"one of {', '.join(names)} or " if names else ""
        raise ConfigError(f"MODEL.PRETRAINED must be {known}a local file, got {pretrained!r}")
    return read_state_dict(Path(pretrained))


def _download(arch: str, name: str) -> dict[str, Tensor]:
    try:
        weights = tv.get_model_weights(arch)[name]
        return weights.get_state_dict(progress=True, check_hash=True)  # type: ignore[no-any-return]
    except (URLError, OSError) as error:
        raise SetupError(
            f"MODEL.PRETRAINED {name} could not be downloaded ({error}); give a local file, or '' to start from scratch"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file: a plain state_dict, or one under "state_dict" or "model"; no code in it is run."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: refused, it holds more than tensors and plain values") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a file of weights") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{path}: holds no state_dict")
    return {key.removeprefix("model."): value for key, value in content.items()}


def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load all but a classifier of another size; anything else that does not fit is an error."""
    own = model.state_dict()
    misfits = [key for key in weights if key not in own or own[key].shape != weights[key].shape]
    misfits += [key for key in own if key not in weights]
    wrong = [key for key in misfits if not key.startswith(HEADS)]
    if wrong:
        raise ConfigError(f"MODEL.PRETRAINED {source} does not fit the model: {wrong[0]} (and {len(wrong) - 1} more)")
    model.load_state_dict({key: value for key, value in weights.items() if key not in misfits}, strict=False)
