"""The config's keys: each is declared once, with its default, its description and the values that it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from dropit import COMPRESS, STRATEGIES, VALUE_DTYPES
from dropit.training.data.datasets import DATASETS, UNREADABLE
from dropit.training.data.transforms import AUTO_AUGMENTS, CROPS
from dropit.training.model.architectures import ARCHS, STEMS, known_arch
from dropit.training.solver.recipe import NO_DECAY, OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class Allowed:
    """The values that a key takes: in words, as a predicate and, if they are a few names, those."""

    text: str
    fits: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    names: Collection[str] = ()  # an error suggests the nearest of them


@dataclass(frozen=True)
class Need:
    """The settings under which a key has an effect; ``otherwise`` names the others, after "has no effect"."""

    otherwise: str
    holds: Callable[[CfgNode], bool]


@dataclass(frozen=True)
class Key:
    """One key: ``name`` is dotted, a value has the type of ``default``."""

    name: str
    default: Any
    about: str
    allowed: Allowed | None = None
    needs: tuple[Need, ...] = ()
    element: type = str  # type of the elements of a list that is empty by default

    @property
    def type(self) -> type:
        """Return the type of the value, or of the elements of a list."""
        if not isinstance(self.default, list):
            return type(self.default)
        return type(self.default[0]) if self.default else self.element


def _one_of(choices: Collection[str]) -> Allowed:
    return Allowed(f"one of {', '.join(filter(None, choices))}", lambda value: value in choices, tuple(choices))


def _three(text: str, fits: Callable[[float], bool]) -> Allowed:
    return Allowed(f"three numbers {text}", lambda value: len(value) == 3 and all(map(fits, value)))


_POSITIVE = Allowed("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = Allowed("at least 0", lambda value: 0 <= value < float("inf"))
_ABOVE_0 = Allowed("above 0", lambda value: 0 < value < float("inf"))
_FRACTION = Allowed("in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_1 = Allowed("in [0, 1)", lambda value: 0 <= value < 1)
_FACTOR = Allowed("in (0, 1]", lambda value: 0 < value <= 1)
_RATE = Allowed("in [0, 1), or -1 for the model's own", lambda value: 0 <= value < 1 or value == -1)
_SHARE = Allowed("[low, high] with 0 < low <= high <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)
_BETAS = Allowed("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v))
_ARCH = Allowed("a torchvision classifier, vit_tiny, resnet_tiny, timm/NAME or hf/NAME", known_arch, names=ARCHS)

_FILES = Need("with DATASET fake", lambda cfg: cfg.DATASET != "fake")
_FOLDER = Need("without TRAIN.PATH or VAL.PATH", lambda cfg: bool(cfg.TRAIN.PATH or cfg.VAL.PATH))
_RESIZED = Need("without TRAIN.CROP random_resized", lambda cfg: cfg.TRAIN.CROP == "random_resized")
_RANDAUGMENT = Need("without TRAIN.AUTO_AUGMENT randaugment", lambda cfg: cfg.TRAIN.AUTO_AUGMENT == "randaugment")
_DROPIT = Need("without MODEL.DROPIT true", lambda cfg: cfg.MODEL.DROPIT)
_DROPS = Need("without a DROPIT.GAMMA above 0", lambda cfg: cfg.DROPIT.GAMMA > 0 or cfg.DROPIT.BUDGET_MB > 0)
_FASTMINK = Need("without DROPIT.STRATEGY fastmink", lambda cfg: cfg.DROPIT.STRATEGY == "fastmink")
_BUDGET = Need("without DROPIT.BUDGET_MB", lambda cfg: cfg.DROPIT.BUDGET_MB > 0)
_NO_BUDGET = Need("with DROPIT.BUDGET_MB, which chooses for each layer", lambda cfg: not cfg.DROPIT.BUDGET_MB)
_SGD = Need("without SOLVER.OPTIMIZER sgd", lambda cfg: cfg.SOLVER.OPTIMIZER == "sgd")
_ADAMW = Need("without SOLVER.OPTIMIZER adamw", lambda cfg: cfg.SOLVER.OPTIMIZER == "adamw")
_DECAY = Need("without SOLVER.WEIGHT_DECAY", lambda cfg: cfg.SOLVER.WEIGHT_DECAY > 0)
_MULTISTEP = Need("without SOLVER.SCHEDULE multistep", lambda cfg: cfg.SOLVER.SCHEDULE == "multistep")
_MILESTONES = Need("without SOLVER.MILESTONES", lambda cfg: bool(cfg.SOLVER.MILESTONES))
_WARMUP = Need("without SOLVER.WARMUP_EPOCHS", lambda cfg: cfg.SOLVER.WARMUP_EPOCHS > 0)
_PROCESSES = Need("in a single process", lambda cfg: cfg.NUM_NODES * cfg.NUM_GPUS > 1)

_KEYS = (
    Key(
        "DATASET",
        "digits",
        "digits (inside scikit-learn), cifar10, cifar100, imagenet, folder (any image folder) or fake (random images)",
        _one_of(DATASETS),
    ),
    Key("NUM_GPUS", 1, "Training processes of each node, each on its own device", _POSITIVE),
    Key("NUM_NODES", 1, "Machines; each starts its own train.py, by torchrun or SLURM", _POSITIVE),
    Key(
        "PARALLEL",
        "ddp",
        "How several processes share the work: ddp (each has the whole model) or fsdp (each a part of the weights)",
        _one_of(("ddp", "fsdp")),
        (_PROCESSES,),
    ),
    Key(
        "ACCELERATOR",
        "auto",
        "What they run on: gpu, cpu, or auto (GPUs where there are any)",
        _one_of(("auto", "gpu", "cpu")),
    ),
    Key("CHECK_VAL_EVERY_N_EPOCH", 1, "Epochs from one evaluation to the next", _POSITIVE),
    Key("CKPT", "", 'Checkpoint to evaluate or to resume from; "" takes the newest of this config\'s runs'),
    Key("OUTPUT_DIR", "outputs", "Where runs go: configs/a/b.yaml writes to OUTPUT_DIR/a/b"),
    Key(
        "SEED",
        42,
        "Of weights, shuffling, augmentation and the random strategy",
        Allowed("in [0, 2^32)", lambda value: 0 <= value < 2**32),
    ),
    Key(
        "TRY_STEPS",
        0,
        "Steps after which to stop, to try a config out, without writing anything; 0 for a whole run",
        _NOT_NEGATIVE,
    ),
    Key(
        "TRAIN.PATH",
        "",
        'Image folder, PATH/<class>/<image>; "" downloads what can be downloaded (cifar10, cifar100)',
        needs=(_FILES,),
    ),
    Key(
        "TRAIN.CROP",
        "none",
        "pad (reflect by 4, random crop), random_resized (a random part, resized) or none",
        _one_of(CROPS),
    ),
    Key(
        "TRAIN.CROP_SCALE",
        [0.08, 1.0],
        "Smallest and largest part of the area that random_resized takes",
        _SHARE,
        (_RESIZED,),
    ),
    Key("TRAIN.FLIP", False, "Flip left and right at random"),
    Key(
        "TRAIN.AUTO_AUGMENT",
        "",
        'randaugment, trivialaugment, or AutoAugment\'s policy for a data set (imagenet, cifar10, svhn); "" for none',
        _one_of(AUTO_AUGMENTS),
    ),
    Key(
        "TRAIN.MAGNITUDE",
        9,
        "Strength of randaugment, 0 to 30",
        Allowed("in [0, 30]", lambda value: 0 <= value <= 30),
        (_RANDAUGMENT,),
    ),
    Key("TRAIN.ERASING", 0.0, "Probability that a part of the image is erased", _FRACTION),
    Key(
        "TRAIN.MIXUP",
        0.0,
        "Alpha of MixUp; 0 for none; with CUTMIX, each batch takes one of the two at random",
        _NOT_NEGATIVE,
    ),
    Key("TRAIN.CUTMIX", 0.0, "Alpha of CutMix; 0 for none", _NOT_NEGATIVE),
    Key(
        "TRAIN.REPEATS",
        1,
        "How often each image is drawn in a row, each time with another augmentation (repeated augmentation); "
        "the length of an epoch stays",
        _POSITIVE,
    ),
    Key(
        "TRAIN.PRECISION",
        "32",
        "What is computed in: 32, tf32 (GPU), bf16 or fp16 (GPU); the last two by autocast",
        _one_of(("32", "tf32", "bf16", "fp16")),
    ),
    Key("TRAIN.COMPILE", False, "Compile the model by torch.compile"),
    Key("TRAIN.CHANNELS_LAST", False, "Images and convolutions with the channels innermost in memory"),
    Key("VAL.PATH", "", "Image folder of the validation images, as TRAIN.PATH", needs=(_FILES,)),
    Key(
        "VAL.RESIZE",
        0,
        "Shorter side before the centre crop of INPUT.SIZE; 0 resizes the whole image to INPUT.SIZE",
        _NOT_NEGATIVE,
    ),
    Key("INPUT.SIZE", 224, "Side of the square images that the model takes, in pixels", _POSITIVE),
    Key(
        "INPUT.MEAN",
        [0.485, 0.456, 0.406],
        "Mean of each channel, of values in [0, 1]",
        _three("in [0, 1]", lambda value: 0 <= value <= 1),
    ),
    Key(
        "INPUT.STD",
        [0.229, 0.224, 0.225],
        "Their standard deviation",
        _three("above 0", lambda value: 0 < value < float("inf")),
    ),
    Key(
        "MODEL.ARCH",
        "resnet18",
        "A torchvision classifier by name, vit_tiny, resnet_tiny, timm/NAME, or hf/NAME (a type or a local directory)",
        _ARCH,
    ),
    Key(
        "MODEL.NUM_CLASSES",
        1000,
        "Outputs of the classifier",
        Allowed("at least 2", lambda value: value >= 2),
    ),
    Key(
        "MODEL.STEM",
        "imagenet",
        "Stem of a ResNet: imagenet (7x7, stride 2, max-pool) or cifar (3x3)",
        _one_of(STEMS),
    ),
    Key(
        "MODEL.PRETRAINED",
        "",
        "Weights to start from: torchvision's or timm's name (IMAGENET1K_V1, a1_in1k) or a local file; "
        '"" starts from scratch',
    ),
    Key("MODEL.DROPOUT", -1.0, "Dropout; -1 for the model's own", _RATE),
    Key("MODEL.ATTENTION_DROPOUT", -1.0, "Dropout of attention's weights; -1 for the model's own", _RATE),
    Key("MODEL.DROP_PATH", -1.0, "Largest rate of stochastic depth; -1 for the model's own", _RATE),
    Key("MODEL.FREEZE", [], "Names of parameters or modules that are not trained; * matches any part of a name"),
    Key(
        "MODEL.SYNC_BN",
        False,
        "Batch normalization over all processes together (GPUs); DropIT then leaves it plain",
    ),
    Key("MODEL.DROPIT", False, "Convert the model's layers, as DROPIT says"),
    Key(
        "DROPIT.STRATEGY",
        "fastmink",
        "What to keep: fastmink (top-k of each block), mink (top-k of the tensor), random; mink_c, random_c (channels)",
        _one_of(STRATEGIES),
        (_DROPIT, _DROPS),
    ),
    Key("DROPIT.GAMMA", 0.9, "Fraction of the elements that is dropped, in [0, 1)", _BELOW_1, (_DROPIT, _NO_BUDGET)),
    Key(
        "DROPIT.D",
        0,
        "Elements in a block of fastmink; 0 for blocks of 256, and one block where there are no more than 16384",
        _NOT_NEGATIVE,
        (_DROPIT, _DROPS, _FASTMINK),
    ),
    Key(
        "DROPIT.COMPRESS",
        "lossless",
        "How the other layers store what they save: none (as PyTorch does), lossless (ReLU as bits, ...), or beyond "
        "that normalization, activations and attention in 16, 8 or 4 bits",
        _one_of(COMPRESS),
        (_DROPIT, _NO_BUDGET),
    ),
    Key(
        "DROPIT.VALUE_DTYPE",
        "",
        'What the kept elements are stored in where it is narrower than their dtype: bf16, int8, or "" for no other',
        _one_of(("", *VALUE_DTYPES)),
        (_DROPIT,),
    ),
    Key(
        "DROPIT.BUDGET_MB",
        0.0,
        "MiB that one process's batch may save for backward: GAMMA and COMPRESS are then ignored, and each layer's "
        "gamma and bits are chosen to fit; 0 for no budget",
        _NOT_NEGATIVE,
        (_DROPIT,),
    ),
    Key("DROPIT.GAMMA_MIN", 0.0, "The least gamma that a budget may choose", _BELOW_1, (_DROPIT, _BUDGET)),
    Key("DROPIT.GAMMA_MAX", 0.98, "The largest gamma that a budget may choose", _BELOW_1, (_DROPIT, _BUDGET)),
    Key(
        "DROPIT.PROBE_EVERY",
        0,
        "Steps from one comparison with the exact gradients to the next, each of which takes a step more; 0 for none",
        _NOT_NEGATIVE,
        (_DROPIT,),
    ),
    Key("DROPIT.SKIP", [], "Names of layers to leave plain; * matches any part of a name", needs=(_DROPIT,)),
    Key("DATALOADER.NUM_WORKERS", 4, "Processes that load images, for each training process", _NOT_NEGATIVE),
    Key("DATALOADER.CACHE", False, "Keep the decoded images in memory, in uint8; they must be of one size"),
    Key("DATALOADER.ON_DEVICE", False, "Crop by pad, flip and normalize whole batches on the device"),
    Key(
        "DATALOADER.UNREADABLE",
        "fail",
        "What to do about an image that cannot be read: fail, or skip (another one replaces it)",
        _one_of(UNREADABLE),
        (_FILES, _FOLDER),
    ),
    Key("SOLVER.BATCH_SIZE", 128, "Samples in a step, over all processes and accumulated batches", _POSITIVE),
    Key("SOLVER.ACCUMULATE", 1, "Batches of each process whose gradients add up to one step", _POSITIVE),
    Key("SOLVER.OPTIMIZER", "sgd", "sgd or adamw", _one_of(OPTIMIZERS)),
    Key("SOLVER.LR", 0.1, "Learning rate", _ABOVE_0),
    Key("SOLVER.MOMENTUM", 0.9, "Momentum of sgd", _FRACTION, (_SGD,)),
    Key("SOLVER.BETAS", [0.9, 0.999], "Decays of adamw's two averages", _BETAS, (_ADAMW,)),
    Key(
        "SOLVER.WEIGHT_DECAY",
        0.0,
        "L2 penalty of sgd, decoupled decay of adamw; on every parameter but those of NO_DECAY",
        _NOT_NEGATIVE,
    ),
    Key(
        "SOLVER.NO_DECAY",
        [],
        "Kinds of parameters without weight decay: norm, bias, position (embeddings and tokens)",
        Allowed(f"of {', '.join(NO_DECAY)}", lambda value: set(value) <= set(NO_DECAY)),
        (_DECAY,),
    ),
    Key(
        "SOLVER.LAYER_DECAY",
        1.0,
        "Factor of the learning rate from each block to the block before it, for fine-tuning",
        _FACTOR,
    ),
    Key("SOLVER.SCHEDULE", "multistep", "multistep or cosine (to MIN_LR at MAX_EPOCHS)", _one_of(SCHEDULES)),
    Key("SOLVER.MIN_LR", 0.0, "Least learning rate", _NOT_NEGATIVE),
    Key("SOLVER.GAMMA", 0.1, "Factor of multistep", _FRACTION, (_MULTISTEP, _MILESTONES)),
    Key(
        "SOLVER.MILESTONES",
        [],
        "Epochs at which multistep applies it",
        Allowed("increasing epochs", lambda value: list(value) == sorted({*value} - {0})),
        (_MULTISTEP,),
        element=int,
    ),
    Key("SOLVER.WARMUP_EPOCHS", 0, "Epochs over which the rate rises from WARMUP_FACTOR * LR to LR", _NOT_NEGATIVE),
    Key("SOLVER.WARMUP_FACTOR", 0.1, "Where the warm-up starts, as a part of LR", _FACTOR, (_WARMUP,)),
    Key("SOLVER.MAX_EPOCHS", 90, "Epochs to train", _POSITIVE),
    Key("SOLVER.CLIP_NORM", 0.0, "Largest norm of all gradients together; 0 for none", _NOT_NEGATIVE),
    Key("SOLVER.LABEL_SMOOTHING", 0.0, "Part of each label that is spread over all classes", _BELOW_1),
    Key(
        "SOLVER.EMA",
        0.0,
        "Decay of the moving average of the weights, which is then evaluated and kept; 0 for none",
        _BELOW_1,
    ),
)
KEYS = {key.name: key for key in _KEYS}


def defaults() -> CfgNode:
    """Return a config in which every key has its default."""
    cfg = CfgNode()
    for key in KEYS.values():
        section, _, name = key.name.rpartition(".")
        node = cfg.setdefault(section, CfgNode()) if section else cfg
        node[name] = copy(key.default)
    return cfg


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return the config by dotted key: {"SOLVER.LR": 0.1, ...}."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return flat
