"""The models: torchvision's classifiers, small ones of the same classes, and those of timm and transformers."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import ConvStemConfig
from torchvision.ops import StochasticDepth

from dropit.training.errors import ConfigError, SetupError, suggest


def vit_tiny(num_classes: int, image_size: int, **rates: float) -> tv.VisionTransformer:
    """Return a ViT of 4 layers, 96 channels and 4 x 4 patches: 0.5 M parameters."""
    patch, shape = image_size // 4, {"num_layers": 4, "num_heads": 3, "hidden_dim": 96, "mlp_dim": 384}
    return tv.VisionTransformer(image_size, patch, num_classes=num_classes, **shape, **rates)


def vit_conv(num_classes: int, image_size: int, **rates: float) -> tv.VisionTransformer:
    """Return a ViT of 4 layers and 192 channels: 1.3 M parameters.

    Its patches of 8 x 8 pixels are the output of three strided convolutions (Xiao et al. 2021), with which a short
    training from scratch comes further.
    """
    stem = [ConvStemConfig(channels, kernel_size=3, stride=2) for channels in (32, 64, 128)]
    shape = {"num_layers": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 384}
    return tv.VisionTransformer(image_size, 8, num_classes=num_classes, conv_stem_configs=stem, **shape, **rates)


def resnet_tiny(num_classes: int) -> ResNet:
    """Return a ResNet of one basic block in each of four stages: 5 M parameters."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


class CifarResNet(ResNet):
    """A ResNet for 32 x 32 images: three stages of 16, 32 and 64 channels (He et al. 2016, section 4.2).

    Its shortcuts are torchvision's: a 1x1 convolution where the shape changes.
    """

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes)
        self.inplanes = 16
        self.conv1 = _stem_convolution(16)
        self.bn1, self.maxpool = nn.BatchNorm2d(16), nn.Identity()
        stages = [self._make_layer(BasicBlock, 16 << stage, blocks, stride=min(stage + 1, 2)) for stage in range(3)]
        self.layer1, self.layer2, self.layer3 = stages
        self.layer4 = nn.Sequential()
        self.fc = nn.Linear(64, num_classes)
        for stage in stages:
            stage.apply(_init_convolution)


def resnet20(num_classes: int) -> ResNet:
    """Return ResNet-20 for 32 x 32 images: 0.28 M parameters."""
    return CifarResNet(3, num_classes)


TINY: dict[str, Callable[..., nn.Module]] = {
    "vit_tiny": vit_tiny,
    "vit_conv": vit_conv,
    "resnet_tiny": resnet_tiny,
    "resnet20": resnet20,
}
ARCHS: tuple[str, ...] = (*TINY, *tv.list_models(module=tv))
STEMS = ("imagenet", "cifar")
# The parameter of each key in the classes that take it: torchvision's, timm's, transformers'.
_RATES = {
    "MODEL.DROPOUT": ("dropout", "mlp_dropout", "drop_rate", "hidden_dropout_prob"),
    "MODEL.ATTENTION_DROPOUT": ("attention_dropout", "attn_drop_rate", "attention_probs_dropout_prob"),
    "MODEL.DROP_PATH": ("stochastic_depth_prob", "drop_path_rate"),
}


def known_arch(name: str) -> bool:
    """Return whether ``name`` is one of ARCHS, or timm/NAME or hf/NAME, which are looked up when they are built."""
    library, _, inner = name.partition("/")
    return name in ARCHS or (library == "hf" and bool(inner)) or (library == "timm" and _is_bare_name(inner))


def _is_bare_name(name: str) -> bool:
    """Return whether it is only a name: timm would also take URLs of weights."""
    return re.fullmatch(r"[\w.]+", name) is not None


def build_model(
    arch: str,
    num_classes: int,
    image_size: int = 224,
    *,
    stem: str = "imagenet",
    dropout: float | None = None,
    attention_dropout: float | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Return the model ``arch``, (N, 3, image_size, image_size) -> (N, num_classes), with initial weights.

    ``dropout``, ``attention_dropout`` and ``drop_path`` (stochastic depth) in [0, 1); None leaves the model's own.
    Raises ConfigError for a rate that the model does not take and for an unknown name or size, SetupError without the
    model's library.
    """
    rates = {"MODEL.DROPOUT": dropout, "MODEL.ATTENTION_DROPOUT": attention_dropout, "MODEL.DROP_PATH": drop_path}
    given = {key: rate for key, rate in rates.items() if rate is not None}
    library, _, name = arch.partition("/")
    build = {"timm": _build_timm, "hf": _build_hf}.get(library, _build_torchvision)
    try:
        model = build(arch if build is _build_torchvision else name, num_classes, image_size, given)
    except NotImplementedError:  # on the meta device, which has no values to start from
        raise
    except (AssertionError, ArithmeticError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"MODEL.ARCH {arch} with INPUT.SIZE {image_size}: {reason}") from error
    if stem == "cifar":
        _use_cifar_stem(arch, model)
    return model


def _build_torchvision(arch: str, num_classes: int, image_size: int, rates: dict[str, float]) -> nn.Module:
    if arch not in ARCHS:
        raise _unknown(arch, "a torchvision classifier, timm/NAME or hf/NAME", arch, ARCHS)
    builder = TINY.get(arch) or tv.get_model_builder(arch)
    options: dict[str, Any] = _translate_rates(rates, _constructor_parameters(get_type_hints(builder)["return"]), arch)
    # These two builders pass a rate of their own.
    depth = options.pop("stochastic_depth_prob", None) if arch.startswith(("swin_", "maxvit_")) else None
    if arch.startswith("vit_"):
        options["image_size"] = image_size
    elif arch.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    elif arch in {"googlenet", "inception_v3"}:
        options |= {"aux_logits": False, "init_weights": True}  # else its outputs are not logits alone
    model: nn.Module = builder(num_classes=num_classes, **options)
    if depth is not None:
        _scale_stochastic_depth(model, depth)
    return model


def _scale_stochastic_depth(model: nn.Module, rate: float) -> None:
    """Scale the rates of all blocks so that the last one has this rate."""
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    last = max(layer.p for layer in layers)
    for layer in layers:
        layer.p *= rate / last


def _build_timm(name: str, num_classes: int, image_size: int, rates: dict[str, float]) -> nn.Module:
    timm = _import("timm", "timm")
    if not _is_bare_name(name) or not timm.is_model(name):
        raise _unknown(f"timm/{name}", "a model of timm", name, timm.list_models())
    options: dict[str, Any] = {}
    if rates:
        with torch.device("meta"):
            taken = _constructor_parameters(type(timm.create_model(name)))
        options |= _translate_rates(rates, taken, f"timm/{name}")
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)  # type: ignore[no-any-return]


def _build_hf(name: str, num_classes: int, image_size: int, rates: dict[str, float]) -> nn.Module:
    transformers = _import("transformers", "hf")
    transformers.logging.set_verbosity_error()
    config = _hf_config(transformers, name)
    config.num_labels = num_classes
    if hasattr(config, "image_size"):
        config.image_size = image_size
    for argument, rate in _translate_rates(rates, config.to_dict(), f"hf/{name}").items():
        setattr(config, argument, rate)
    config.architectures = config.architectures or []  # None is an error where a type has two classes
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(
        config,
        trust_remote_code=False,
        attn_implementation=None,  # a config.json may name one that would be downloaded and run
    )
    model.register_forward_hook(_logits)
    return model


def _hf_config(transformers: Any, name: str) -> Any:
    """Return the default config of a model type, or that of a local directory; nothing is downloaded or run."""
    types = [config.model_type for config in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING]
    if name in types:
        return transformers.AutoConfig.for_model(name)
    if not name or not Path(name).is_dir():
        expected = "a model type of transformers' image classifiers or a local directory"
        raise _unknown(f"hf/{name}", expected, name, types)
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # mistakes in a config.json raise errors of many types
        raise ConfigError(f"MODEL.ARCH hf/{name}: holds no config.json that transformers can read") from error


def _logits(module: nn.Module, args: Any, output: Any) -> Tensor:
    """Return the logits of an output; as a hook, so that the names of layers stay those of transformers."""
    return output.logits  # type: ignore[no-any-return]


def _import(library: str, extra: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise SetupError(f'MODEL.ARCH {extra}/... needs {library}: pip install "dropit[{extra}]"') from error


def _unknown(arch: str, expected: str, name: str, valid: Iterable[str]) -> ConfigError:
    return ConfigError(f"MODEL.ARCH must be {expected}, got {arch!r}{suggest(name, valid, 3)}")


def _constructor_parameters(model_class: type) -> set[str]:
    """Return the names of the parameters of a class's constructor and of its parents'."""
    return {
        name for base in model_class.__mro__ for name in inspect.signature(vars(base).get("__init__", base)).parameters
    }


def _translate_rates(rates: dict[str, float], taken: Collection[str], arch: str) -> dict[str, float]:
    """Return the rates by the names of the model's parameters."""
    named = {}
    for key, rate in rates.items():
        name = next((name for name in _RATES[key] if name in taken), None)
        if name is not None:
            named[name] = rate
        elif rate:
            raise ConfigError(f"{key} must be 0, or -1 for the model's own, as {arch} takes none, got {rate:g}")
    return named


def _use_cifar_stem(arch: str, model: nn.Module) -> None:
    """Replace the stem for images of 32 x 32: a 3x3 convolution that keeps the size, and no pooling."""
    if not isinstance(model, ResNet):
        raise ConfigError(f"MODEL.STEM cifar is for ResNets, not for {arch}")
    model.conv1 = _stem_convolution(model.conv1.out_channels)
    model.maxpool = nn.Identity()


def _stem_convolution(channels: int) -> nn.Conv2d:
    stem = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
    _init_convolution(stem)
    return stem


def _init_convolution(module: nn.Module) -> None:
    """Draw the weight of a convolution as torchvision's ResNets do."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
