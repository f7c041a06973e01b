"""Pretrained weights: downloaded or read from a file, and fitted to a model."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from dropit.training.checkpoint.files import nearest_file, read_file, shorten
from dropit.training.errors import ConfigError, SetupError, suggest
from dropit.training.model.architectures import ARCHS, TINY

Weights = dict[str, Tensor]

# The keys of weights in files that hold more: averaged ones (EMA), which are better, come first.
_PARTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model")
# The prefixes of DDP, torch.compile and a LightningModule.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Parts that need not fit: classifiers, and heads that are only for pretraining.
_HEADS = {"fc", "heads", "head", "head_dist", "classifier", "last_linear", "aux1", "aux2", "AuxLogits", "pooler"}
_POSITIONS = ("pos_embedding", "pos_embed", "position_embeddings")
# Names in torchvision's older files.
_OLD_NAMES = {
    r"\.mlp\.linear_1\.": ".mlp.0.",
    r"\.mlp\.linear_2\.": ".mlp.3.",
    r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)": r"\1\2",
}
# timm's and DeiT's names of a ViT, and torchvision's.
_VIT_NAMES = {
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
    r"^patch_embed\.proj\.": "conv_proj.",
    r"^cls_token$": "class_token",
    r"^pos_embed$": "encoder.pos_embedding",
    r"^norm\.": "encoder.ln.",
    r"^head\.": "heads.head.",
}


@dataclass(frozen=True)
class LoadReport:
    """What was done with the tensors of a file, by name; ``str`` is one to three lines."""

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # of the loaded: position embeddings of another image size
    skipped: tuple[str, ...]  # in the file, not used
    missing: tuple[str, ...]  # of the model, unchanged

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        if self.resized:
            lines.append(f"resized: {shorten(self.resized)}")
        unused = [name for name in self.skipped if name not in self.missing]
        rest = [f"new: {shorten(self.missing)}"] if self.missing else []
        rest += [f"not used: {shorten(unused)}"] if unused else []
        return "\n             ".join([*lines, "; ".join(rest)] if rest else lines)


def load_pretrained(model: nn.Module, source: str, arch: str) -> LoadReport:
    """Load weights by torchvision's or timm's name or from a local file, except a classifier of another size.

    Translates the names of timm's ViTs, of transformers' older versions and of wrappers (DDP, compile, Lightning), and
    resizes position embeddings. Returns what was loaded. Raises ConfigError for weights of another model, SetupError
    for an unusable file.
    """
    weights, part = _find(source, arch)
    target = model.state_dict()
    weights = _rename(_strip(weights, target), target, vit=isinstance(model, tv.VisionTransformer))
    weights, resized = _resize_positions(weights, target)
    if arch.startswith("hf/"):
        weights = _rename_hf(model, weights)
    skipped = tuple(name for name in weights if name not in target or target[name].shape != weights[name].shape)
    # Old files lack the counts; BatchNorm starts them at 0.
    absent = (name for name in target if name not in weights and not name.endswith(".num_batches_tracked"))
    missing = tuple(dict.fromkeys([*(name for name in skipped if name in target), *absent]))
    _check_fit(weights, target, [name for name in (*skipped, *missing) if not _is_head(name)], source, arch)
    loaded = {name: tensor for name, tensor in weights.items() if name not in skipped}
    model.load_state_dict(loaded, strict=False)
    return LoadReport(f"{source} ({part})" if part else source, tuple(loaded), resized, skipped, missing)


def _find(source: str, arch: str) -> tuple[Weights, str]:
    """Return the weights, and the part of the file that they are."""
    published = _published(arch)
    if source in published:
        return _download(published[source], source), ""
    path = Path(source)
    if path.exists():
        return find_weights(read_file(path, "MODEL.PRETRAINED"), source)
    names = [name for name in published if name != "DEFAULT"]
    known = f"one of {', '.join(names)} or " if names else ""
    near = suggest(source, names) or nearest_file(path)
    raise ConfigError(f"MODEL.PRETRAINED must be {known}a local file, got {source!r}{near}")


def _published(arch: str) -> dict[str, Callable[[], Mapping[str, Any]]]:
    """Return what downloads the weights that the model's library publishes, by their names there."""
    if arch.startswith("timm/"):
        name = arch.removeprefix("timm/").partition(".")[0]
        return {full.removeprefix(f"{name}."): partial(_timm_weights, full) for full in _timm_names(name)}
    if arch not in ARCHS or arch in TINY:
        return {}
    known = tv.get_model_weights(arch).__members__
    return {name: partial(weights.get_state_dict, progress=True, check_hash=True) for name, weights in known.items()}


def _timm_names(name: str) -> list[str]:
    import timm

    return timm.list_pretrained(f"{name}.*")  # type: ignore[no-any-return]


def _timm_weights(name: str) -> Mapping[str, Any]:
    import timm

    return timm.create_model(name, pretrained=True).state_dict()  # type: ignore[no-any-return]


def _download(fetch: Callable[[], Mapping[str, Any]], name: str) -> Weights:
    try:
        return dict(fetch())
    except (URLError, OSError, RuntimeError) as error:
        raise SetupError(
            f"MODEL.PRETRAINED {name} could not be downloaded ({' '.join(str(error).split())}); give a local file, or "
            "'' to start from scratch"
        ) from error


def find_weights(content: Any, source: str) -> tuple[Weights, str]:
    """Return the state_dict in the content of a file and its key there: averaged weights (EMA) first."""
    parts = content if isinstance(content, Mapping) else {}
    for part in _PARTS:
        if tensors := _tensors(parts.get(part)):
            return tensors, part
    if tensors := _tensors(parts):
        return tensors, ""
    raise SetupError(f"MODEL.PRETRAINED {source}: holds no state_dict")


def _tensors(content: Any) -> Weights:
    items = content.items() if isinstance(content, Mapping) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _strip(weights: Weights, target: Mapping[str, Tensor]) -> Weights:
    """Return the weights without the prefixes of wrappers; tensors beside them that have none are left out."""
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if inside and not any(name.startswith(prefix) for name in target):
            return _strip(inside, target)
    return weights


def _rename(weights: Weights, target: Mapping[str, Tensor], *, vit: bool) -> Weights:
    """Return the weights by the names that the model has now."""

    def renamed(name: str) -> str:
        for pattern, new in (_OLD_NAMES | (_VIT_NAMES if vit else {})).items():
            name = re.sub(pattern, new, name)
        return name

    return {name if name in target else renamed(name): tensor for name, tensor in weights.items()}


def _rename_hf(model: Any, weights: Weights) -> Weights:
    """Return the weights as transformers' loader renames them, and unchanged what does not fit."""
    import transformers

    transformers.logging.disable_progress_bar()
    fitted, info = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(weights), ignore_mismatched_sizes=True, output_loading_info=True
    )
    other = {name for name, *_ in info["mismatched_keys"]}
    kept = {name: tensor for name, tensor in fitted.state_dict().items() if name not in other | info["missing_keys"]}
    rest = {name: weights[name] for name in (*info["unexpected_keys"], *sorted(other)) if name in weights}
    return kept | rest


def _resize_positions(weights: Weights, target: Mapping[str, Tensor]) -> tuple[Weights, tuple[str, ...]]:
    """Return the weights with position embeddings for the model's image size, and the names of those."""
    resized = {}
    for name in weights.keys() & target.keys():
        old, new = weights[name], target[name]
        if name.endswith(_POSITIONS) and old.dim() == new.dim() == 3 and old.shape[1] != new.shape[1]:
            tokens = new.shape[1] - math.isqrt(new.shape[1]) ** 2
            if old.shape[1] - math.isqrt(old.shape[1]) ** 2 == tokens:
                resized[name] = _resize(old, tokens, math.isqrt(new.shape[1]))
    return weights | resized, tuple(resized)


def _resize(positions: Tensor, tokens: int, side: int) -> Tensor:
    """Return (1, tokens + old side^2, D) position embeddings for ``side`` x ``side`` patches; tokens' are kept."""
    kept, grid = positions[:, :tokens].float(), positions[:, tokens:].float()
    one_token = torch.cat([grid[:, :1], grid], dim=1)  # what torchvision expects
    state = interpolate_embeddings(side, 1, OrderedDict({"encoder.pos_embedding": one_token}))
    return torch.cat([kept, state["encoder.pos_embedding"][:, 1:]], dim=1)


def _is_head(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in _HEADS or "pooler" in parts


def _check_fit(weights: Weights, target: Mapping[str, Tensor], wrong: list[str], source: str, arch: str) -> None:
    if not wrong:
        return
    name = wrong[0]
    if name not in target:
        what = f"it holds {name}, which the model does not have"
    elif name not in weights:
        what = f"it lacks {name}"
    else:
        what = f"{name} is {_shape(weights[name])} in it, {_shape(target[name])} in the model"
    more = len(set(wrong)) - 1
    raise ConfigError(
        f"MODEL.PRETRAINED {source} does not fit {arch}: {what}{f', and {more} more such' if more else ''}"
    )


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
