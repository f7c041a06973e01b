"""The config: every key with its default, and how a YAML file and the command line change them.

load -> override -> check -> freeze. Values are read by the type of their default, never by YAML's guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from dropit import COMPRESS, STRATEGIES, VALUE_DTYPES
from dropit.training.data.datasets import DATASETS, UNREADABLE
from dropit.training.data.transforms import AUTO_AUGMENTS, CROPS
from dropit.training.errors import ConfigError
from dropit.training.model.architectures import ARCHS, STEMS, known_arch, suggest
from dropit.training.solver.optimizer import NO_DECAY, OPTIMIZERS, SCHEDULES


def defaults() -> CfgNode:
    """Every key with its default."""
    cfg = CfgNode()

    # digits (inside scikit-learn), cifar10, cifar100, imagenet, folder (any image folder) or fake (random images)
    cfg.DATASET = "digits"

    cfg.TRAIN = CfgNode()
    # Image folder, PATH/<class>/<image>; "" downloads what can be downloaded (cifar10, cifar100)
    cfg.TRAIN.PATH = ""
    # pad (reflect by 4, random crop), random_resized (a random part, resized) or none
    cfg.TRAIN.CROP = "none"
    # Smallest and largest part of the area that random_resized takes
    cfg.TRAIN.CROP_SCALE = [0.08, 1.0]
    # Flip left and right at random
    cfg.TRAIN.FLIP = False
    # randaugment, trivialaugment, or a policy of AutoAugment by its data set (imagenet, cifar10, svhn); "" for none
    cfg.TRAIN.AUTO_AUGMENT = ""
    # Strength of randaugment, 0 to 30
    cfg.TRAIN.MAGNITUDE = 9
    # Probability that a part of the image is erased
    cfg.TRAIN.ERASING = 0.0
    # Alpha of MixUp; 0 for none; where CUTMIX is given as well, each batch takes one of them at random
    cfg.TRAIN.MIXUP = 0.0
    # Alpha of CutMix; 0 for none
    cfg.TRAIN.CUTMIX = 0.0
    # How often each image is drawn in a row, each time augmented anew; an epoch is as long as ever
    cfg.TRAIN.REPEATS = 1
    # What is computed in: 32, tf32 (GPU), bf16 or fp16 (GPU); the last two by autocast
    cfg.TRAIN.PRECISION = "32"
    # Compile the model by torch.compile
    cfg.TRAIN.COMPILE = False
    # Images and convolutions with the channels innermost in memory
    cfg.TRAIN.CHANNELS_LAST = False

    cfg.VAL = CfgNode()
    # Image folder of the validation images, as TRAIN.PATH
    cfg.VAL.PATH = ""
    # Shorter side before the centre crop of INPUT.SIZE; 0 resizes the whole image to INPUT.SIZE
    cfg.VAL.RESIZE = 0

    cfg.INPUT = CfgNode()
    # Side of the square that the model sees, in pixels
    cfg.INPUT.SIZE = 224
    # Mean of each channel, of values in [0, 1]
    cfg.INPUT.MEAN = [0.485, 0.456, 0.406]
    # Their standard deviation
    cfg.INPUT.STD = [0.229, 0.224, 0.225]

    cfg.MODEL = CfgNode()
    # A torchvision classifier by name, vit_tiny, resnet_tiny, timm/NAME, or hf/NAME (a type or a local directory)
    cfg.MODEL.ARCH = "resnet18"
    # Outputs of the classifier
    cfg.MODEL.NUM_CLASSES = 1000
    # Stem of a ResNet: imagenet (7x7, stride 2, max-pool) or cifar (3x3)
    cfg.MODEL.STEM = "imagenet"
    # Weights to start from: torchvision's name (IMAGENET1K_V1) or a local file; "" starts from scratch
    cfg.MODEL.PRETRAINED = ""
    # Dropout; -1 for the model's own
    cfg.MODEL.DROPOUT = -1.0
    # Dropout of attention's weights; -1 for the model's own
    cfg.MODEL.ATTENTION_DROPOUT = -1.0
    # Largest rate of stochastic depth; -1 for the model's own
    cfg.MODEL.DROP_PATH = -1.0
    # Names of parameters or modules that are not trained; * matches any part of a name
    cfg.MODEL.FREEZE = []
    # Batch normalization over all processes together (GPUs); it is then left plain
    cfg.MODEL.SYNC_BN = False
    # Drop parts of the Linear and Conv2d inputs, as DROPIT says
    cfg.MODEL.DROPIT = False

    cfg.DROPIT = CfgNode()
    # What to keep: fastmink (top-k of each block), mink (top-k of the tensor), random; mink_c, random_c (channels)
    cfg.DROPIT.STRATEGY = "fastmink"
    # Fraction of the elements that is dropped, in [0, 1)
    cfg.DROPIT.GAMMA = 0.9
    # Elements in a block of fastmink; 0 for blocks of 256, and one block where there are no more than 16384
    cfg.DROPIT.D = 0
    # How the other layers keep what they keep: none (as PyTorch does), lossless (ReLU as bits, ...), or beyond that
    # normalization, activations and attention in 16, 8 or 4 bits
    cfg.DROPIT.COMPRESS = "lossless"
    # What the kept elements are stored in where that is narrower than theirs: bf16, int8, or "" for no other
    cfg.DROPIT.VALUE_DTYPE = ""
    # Bytes that one process's batch may hold for backward, in MiB: each layer's gamma and bits are then chosen by
    # themselves, and GAMMA and COMPRESS are not asked; 0 for no budget
    cfg.DROPIT.BUDGET_MB = 0.0
    # The least gamma that a budget may choose
    cfg.DROPIT.GAMMA_MIN = 0.0
    # The largest
    cfg.DROPIT.GAMMA_MAX = 0.98
    # Steps from one comparison with the exact gradients to the next, each of which takes a step more; 0 for none
    cfg.DROPIT.PROBE_EVERY = 0
    # Names of layers to leave plain; * matches any part of a name
    cfg.DROPIT.SKIP = []

    cfg.DATALOADER = CfgNode()
    # Processes that load images, for each training process
    cfg.DATALOADER.NUM_WORKERS = 4
    # Batches that each of them has ready
    cfg.DATALOADER.PREFETCH = 2
    # Keep the decoded images in memory, in uint8; they must be of one size
    cfg.DATALOADER.CACHE = False
    # Crop by pad, flip and normalize whole batches on the device, and not image by image
    cfg.DATALOADER.ON_DEVICE = False
    # What to do about an image that cannot be read: fail, or skip (another one takes its place)
    cfg.DATALOADER.UNREADABLE = "fail"

    cfg.SOLVER = CfgNode()
    # Samples in a step, over all processes and all batches that ACCUMULATE says
    cfg.SOLVER.BATCH_SIZE = 128
    # Batches that each process takes one after the other for one step
    cfg.SOLVER.ACCUMULATE = 1
    # sgd or adamw
    cfg.SOLVER.OPTIMIZER = "sgd"
    # Learning rate
    cfg.SOLVER.LR = 0.1
    # Momentum of sgd
    cfg.SOLVER.MOMENTUM = 0.9
    # Nesterov's momentum, of sgd
    cfg.SOLVER.NESTEROV = False
    # Decays of adamw's two averages
    cfg.SOLVER.BETAS = [0.9, 0.999]
    # L2 penalty of sgd, decoupled decay of adamw; on every parameter but for NO_DECAY
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    # Kinds of parameters without weight decay: norm, bias, position (embeddings and tokens)
    cfg.SOLVER.NO_DECAY = []
    # Factor of the learning rate from each block to the block before it, for fine-tuning
    cfg.SOLVER.LAYER_DECAY = 1.0
    # multistep or cosine (to MIN_LR at MAX_EPOCHS)
    cfg.SOLVER.SCHEDULE = "multistep"
    # Least learning rate
    cfg.SOLVER.MIN_LR = 0.0
    # Factor of multistep
    cfg.SOLVER.GAMMA = 0.1
    # Epochs at which multistep applies it
    cfg.SOLVER.MILESTONES = []
    # Epochs over which the rate rises from WARMUP_FACTOR * LR to LR
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # Where the warm-up starts, as a part of LR
    cfg.SOLVER.WARMUP_FACTOR = 0.1
    # Epochs to train
    cfg.SOLVER.MAX_EPOCHS = 90
    # Largest norm of all gradients together, to which they are scaled down; 0 for none
    cfg.SOLVER.CLIP_NORM = 0.0
    # Part of each label that is spread over all classes
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # Decay of the moving average of the weights, which is then what is evaluated and kept; 0 for none
    cfg.SOLVER.EMA = 0.0

    # Training processes of each node, each on a device of its own
    cfg.NUM_GPUS = 1
    # Machines; each starts its own train.py, by torchrun or SLURM
    cfg.NUM_NODES = 1
    # How several processes share the work: ddp (each has the whole model) or fsdp (each a part of the weights)
    cfg.PARALLEL = "ddp"
    # What they run on: gpu, cpu, or auto (GPUs where there are any)
    cfg.ACCELERATOR = "auto"
    # Epochs from one evaluation to the next
    cfg.CHECK_VAL_EVERY_N_EPOCH = 1
    # Checkpoint to evaluate or to resume from; "" takes the newest of this config's runs
    cfg.CKPT = ""
    # Where runs go: configs/a/b.yaml writes to OUTPUT_DIR/a/b
    cfg.OUTPUT_DIR = "outputs"
    # Of weights, shuffling, augmentation and the random strategy
    cfg.SEED = 42
    # Steps after which to stop, to try a config out; nothing is written then. 0 to train in earnest
    cfg.TRY_STEPS = 0
    return cfg


@dataclass(frozen=True)
class Place:
    """Where a value was given: a line of a file, or the command line."""

    source: str
    line: int | None = None

    def at(self, node: yaml.Node) -> Place:
        """The node's line, where the source has lines."""
        return self if self.line is None else Place(self.source, node.start_mark.line + 1)

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


Check = tuple[str, Callable[[Any], bool]]
POSITIVE: Check = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: Check = ("at least 0", lambda value: 0 <= value < float("inf"))
FRACTION: Check = ("in [0, 1]", lambda value: 0 <= value <= 1)
RATE: Check = ("in [0, 1), or -1 for the model's own", lambda value: 0 <= value < 1 or value == -1)


def _three(what: str, fits: Callable[[float], bool]) -> Check:
    return f"three numbers {what}", lambda value: len(value) == 3 and all(map(fits, value))


CHECKS: dict[str, Check] = {
    "TRAIN.MAGNITUDE": ("in [0, 30]", lambda value: 0 <= value <= 30),
    "TRAIN.ERASING": FRACTION,
    "TRAIN.MIXUP": NOT_NEGATIVE,
    "TRAIN.CUTMIX": NOT_NEGATIVE,
    "TRAIN.REPEATS": POSITIVE,
    "TRAIN.CROP_SCALE": ("[low, high] with 0 < low <= high <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1),
    "VAL.RESIZE": NOT_NEGATIVE,
    "INPUT.SIZE": POSITIVE,
    "INPUT.MEAN": _three("in [0, 1]", lambda value: 0 <= value <= 1),
    "INPUT.STD": _three("above 0", lambda value: 0 < value < float("inf")),
    "MODEL.NUM_CLASSES": ("at least 2", lambda value: value >= 2),
    "MODEL.ARCH": ("a torchvision classifier, vit_tiny, resnet_tiny, timm/NAME or hf/NAME", known_arch),
    "MODEL.DROPOUT": RATE,
    "MODEL.ATTENTION_DROPOUT": RATE,
    "MODEL.DROP_PATH": RATE,
    "DROPIT.GAMMA": ("in [0, 1)", lambda value: 0 <= value < 1),
    "DROPIT.GAMMA_MIN": ("in [0, 1)", lambda value: 0 <= value < 1),
    "DROPIT.GAMMA_MAX": ("in [0, 1)", lambda value: 0 <= value < 1),
    "DROPIT.BUDGET_MB": NOT_NEGATIVE,
    "DROPIT.PROBE_EVERY": NOT_NEGATIVE,
    "DROPIT.D": NOT_NEGATIVE,
    "DATALOADER.NUM_WORKERS": NOT_NEGATIVE,
    "DATALOADER.PREFETCH": POSITIVE,
    "SOLVER.BATCH_SIZE": POSITIVE,
    "SOLVER.ACCUMULATE": POSITIVE,
    "SOLVER.CLIP_NORM": NOT_NEGATIVE,
    "SOLVER.LABEL_SMOOTHING": ("in [0, 1)", lambda value: 0 <= value < 1),
    "SOLVER.EMA": ("in [0, 1)", lambda value: 0 <= value < 1),
    "SOLVER.LR": ("above 0", lambda value: 0 < value < float("inf")),
    "SOLVER.MOMENTUM": FRACTION,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.BETAS": ("two numbers in [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value)),
    "SOLVER.NO_DECAY": (f"of {', '.join(NO_DECAY)}", lambda value: set(value) <= set(NO_DECAY)),
    "SOLVER.LAYER_DECAY": ("in (0, 1]", lambda value: 0 < value <= 1),
    "SOLVER.MIN_LR": NOT_NEGATIVE,
    "SOLVER.GAMMA": FRACTION,
    "SOLVER.MILESTONES": ("increasing epochs", lambda v: list(v) == sorted({*v} - {0})),
    "SOLVER.WARMUP_EPOCHS": NOT_NEGATIVE,
    "SOLVER.WARMUP_FACTOR": ("in (0, 1]", lambda value: 0 < value <= 1),
    "SOLVER.MAX_EPOCHS": POSITIVE,
    "NUM_GPUS": POSITIVE,
    "NUM_NODES": POSITIVE,
    "TRY_STEPS": NOT_NEGATIVE,
    "CHECK_VAL_EVERY_N_EPOCH": POSITIVE,
    "SEED": ("in [0, 2^32)", lambda value: 0 <= value < 2**32),
}

CHOICES: dict[str, Sequence[str]] = {
    "DATASET": DATASETS,
    "TRAIN.CROP": CROPS,
    "TRAIN.AUTO_AUGMENT": AUTO_AUGMENTS,
    "DATALOADER.UNREADABLE": UNREADABLE,
    "TRAIN.PRECISION": ("32", "tf32", "bf16", "fp16"),
    "MODEL.STEM": STEMS,
    "DROPIT.STRATEGY": tuple(STRATEGIES),
    "DROPIT.COMPRESS": COMPRESS,
    "DROPIT.VALUE_DTYPE": ("", *VALUE_DTYPES),
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "SOLVER.SCHEDULE": SCHEDULES,
    "ACCELERATOR": ("auto", "gpu", "cpu"),
    "PARALLEL": ("ddp", "fsdp"),
}

# What the lists hold that are empty by default.
ELEMENT_TYPES = {"SOLVER.MILESTONES": int, "SOLVER.NO_DECAY": str, "DROPIT.SKIP": str, "MODEL.FREEZE": str}
_NUMBERS = {int: "an integer", float: "a number", bool: "true or false"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def load(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file and of KEY VALUE (or KEY=VALUE) overrides, checked and frozen.

    Raises ConfigError with one line that names the key, what was given, what would be right, and where.
    """
    cfg, origins = defaults(), dict[str, Place]()
    _merge_file(cfg, origins, Path(path), ())
    for key, text in _pairs(overrides):
        _set(cfg, origins, key, _compose_override(key, text), Place("command line"))
    _check(cfg, origins)
    cfg.freeze()
    return cfg


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """{"SOLVER.LR": 0.1, ...}: the config by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return flat


def _merge_file(cfg: CfgNode, origins: dict[str, Place], path: Path, below: tuple[Path, ...]) -> None:
    if path.resolve() in below:
        raise ConfigError(f"{path}: _BASE_ leads back to this file")
    root = _compose_file(path)
    entries = {key: (node, place) for key, node, place in _entries(root, Place(str(path), 1))}
    if "_BASE_" in entries:
        node, place = entries.pop("_BASE_")
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"_BASE_ must be the path of a YAML file ({place})")
        _merge_file(cfg, origins, path.parent / node.value, (*below, path.resolve()))
    for key, (node, place) in entries.items():
        _set(cfg, origins, key, node, place)


def _compose_file(path: Path) -> yaml.Node:
    if path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"{path}: a config is a local .yaml or .yml file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{_nearest_files(path)}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if root is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected KEY: value lines")
    return root


def _nearest_files(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix in {".yaml", ".yml"}]
    except OSError:
        return ""
    return suggest(path.name, names)


def _entries(mapping: yaml.Node, place: Place) -> Iterator[tuple[str, yaml.Node, Place]]:
    """Key, value and place of each entry; a key twice is an error."""
    seen: dict[str, Place] = {}
    for key_node, node in mapping.value:
        here = place.at(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"a key must be a name, got {_shown(key_node)} ({here})")
        key = key_node.value
        if key in seen:
            raise ConfigError(f"{key} is given twice ({here}, and first {seen[key]})")
        seen[key] = here
        yield key, node, here


def _pairs(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(tokens)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{key} has no value (overrides are KEY VALUE pairs)")
            value = rest.pop(0)
        yield key, value


def _compose_override(key: str, text: str) -> yaml.Node:
    """The node that the text would be in a file; a list may come without its brackets."""
    if not text.lstrip().startswith(("[", "{")):
        return yaml.ScalarNode("tag:yaml.org,2002:str", text)
    try:
        node: yaml.Node = yaml.compose(text, Loader=yaml.SafeLoader)  # type: ignore[assignment]
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: cannot read {text!r} (command line)") from error
    return node


def _set(cfg: CfgNode, origins: dict[str, Place], key: str, node: yaml.Node, place: Place) -> None:
    """Set a dotted key, or every key of a section, to what the node says."""
    *sections, name = key.split(".")
    parent = cfg
    for depth, section in enumerate([*sections, name]):
        known = "".join(f"{above}." for above in sections[:depth])
        if not isinstance(parent, CfgNode) or section not in parent:
            valid = list(parent) if isinstance(parent, CfgNode) else []
            raise ConfigError(f"{known}{section}: no such key{suggest(section, valid)} ({place})")
        if depth < len(sections):
            parent = parent[section]
    if not isinstance(parent[name], CfgNode):
        parent[name] = _convert(key, node, parent[name], place)
        origins[key] = place
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key} is a section: expected its keys, got {_shown(node)} ({place})")
    for inner, value, here in _entries(node, place):
        _set(cfg, origins, f"{key}.{inner}", value, here)


def _convert(key: str, node: yaml.Node, default: Any, place: Place) -> Any:
    """The node's value in the type of the key's default."""
    if not isinstance(default, list):
        return _convert_scalar(key, node, type(default), place)
    kind = ELEMENT_TYPES.get(key) or type(default[0])
    if isinstance(node, yaml.ScalarNode):
        parts = [part.strip() for part in node.value.split(",") if part.strip()]
        return [_convert_scalar(key, yaml.ScalarNode(node.tag, part), kind, place) for part in parts]
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"{key} must be a list, got {_shown(node)} ({place})")
    return [_convert_scalar(key, element, kind, place) for element in node.value]


def _convert_scalar(key: str, node: yaml.Node, kind: type, place: Place) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{key} must be {_NUMBERS.get(kind, 'a string')}, got {_shown(node)} ({place})")
    if node.tag == "tag:yaml.org,2002:null" and node.style is None:
        raise ConfigError(f"{key} has no value ({place})")
    if kind is str:
        return node.value
    try:
        if node.style is not None:  # quoted in the file: meant as a string
            raise ValueError
        return _parse(node.value, kind)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{key} must be {_NUMBERS[kind]}, got {node.value!r} ({place})") from error


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[text.lower()]
    if kind is float:
        return float(text)
    number = float(text)  # 1e2 is an integer too
    if number != int(number):
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _check(cfg: CfgNode, origins: dict[str, Place]) -> None:
    values = flatten(cfg)

    def refuse(key: str, must: str) -> None:
        raise ConfigError(f"{key} must be {must}, got {values[key]!r} ({origins.get(key, 'default')})")

    for key, choices in CHOICES.items():
        if values[key] not in choices:
            refuse(key, f"one of {', '.join(filter(None, choices))}")
    for key, (must, fits) in CHECKS.items():
        if not fits(values[key]):
            refuse(key, must + (suggest(values[key], ARCHS) if key == "MODEL.ARCH" else ""))
    shares = cfg.NUM_NODES * cfg.NUM_GPUS * cfg.SOLVER.ACCUMULATE
    if cfg.SOLVER.BATCH_SIZE % shares:
        refuse("SOLVER.BATCH_SIZE", f"a multiple of NUM_NODES * NUM_GPUS * SOLVER.ACCUMULATE ({shares}), its shares")
    if cfg.SOLVER.ACCUMULATE > 1 and cfg.DROPIT.PROBE_EVERY:
        refuse("DROPIT.PROBE_EVERY", "0 with SOLVER.ACCUMULATE, as it compares the gradients of one batch")
    if cfg.PARALLEL == "fsdp" and (cfg.SOLVER.EMA or cfg.DROPIT.PROBE_EVERY):
        refuse("PARALLEL", "ddp with SOLVER.EMA or DROPIT.PROBE_EVERY, which need whole weights")


def _shown(node: yaml.Node) -> str:
    kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {kind}"
