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
from dropit.training.model.architectures import ARCHS, STEMS, TINY, known_arch
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
    allowed: Allowed
    about: str
    needs: tuple[Need, ...] = ()
    element: type = str  # type of the elements of a list that is empty by default
    is_path: bool = False  # of which ~ and $NAME are expanded

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


_ANYTHING = Allowed("", lambda value: True)
_POSITIVE = Allowed("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = Allowed("at least 0", lambda value: 0 <= value < float("inf"))
_ABOVE_0 = Allowed("above 0, and of float32's range", lambda value: 0 < value < 3e38)
_FRACTION = Allowed("in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_1 = Allowed("in [0, 1)", lambda value: 0 <= value < 1)
_FACTOR = Allowed("in (0, 1]", lambda value: 0 < value <= 1)
_RATE = Allowed("in [0, 1), or -1 for the model's own", lambda value: 0 <= value < 1 or value == -1)
_SHARE = Allowed("[low, high] with 0 < low <= high <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)
_BETAS = Allowed("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v))
_EPOCHS = Allowed("increasing epochs, from 1 on", lambda v: list(v) == sorted({*v}) and min(v, default=1) > 0)
_ARCH = Allowed(f"a torchvision classifier, {', '.join(TINY)}, timm/NAME or hf/NAME", known_arch, names=ARCHS)

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
_WORKERS = Need("without DATALOADER.NUM_WORKERS", lambda cfg: cfg.DATALOADER.NUM_WORKERS > 0)
_PROCESSES = Need("in a single process", lambda cfg: cfg.NUM_NODES * cfg.NUM_GPUS > 1)

# For each key its name, default and allowed values in one line, and its description below.
# fmt: off
_KEYS = (
    Key("DATASET", "digits", _one_of(DATASETS),
        "digits (inside scikit-learn), cifar10, cifar100, imagenet, folder (any image folder) or fake (random images)"),
    Key("NUM_GPUS", 1, _POSITIVE, "Training processes of each node, each on its own device"),
    Key("NUM_NODES", 1, _POSITIVE, "Machines; each starts its own train.py, by torchrun or SLURM"),
    Key("PARALLEL", "ddp", _one_of(("ddp", "fsdp")),
        "How several processes share the work: ddp (each has the whole model) or fsdp (each a part of the weights)",
        needs=(_PROCESSES,)),
    Key("ACCELERATOR", "auto", _one_of(("auto", "gpu", "cpu")),
        "What the processes run on: gpu, cpu, or auto (GPUs where there are any)"),
    Key("CHECK_VAL_EVERY_N_EPOCH", 1, _POSITIVE, "Epochs from one evaluation to the next"),
    Key("CKPT", "", _ANYTHING, "Checkpoint to evaluate or to resume from; \"\" takes the newest of this config's runs",
        is_path=True),
    Key("OUTPUT_DIR", "outputs", _ANYTHING, "Where runs go: configs/a/b.yaml writes to OUTPUT_DIR/a/b", is_path=True),
    Key("SEED", 42, Allowed("in [0, 2^32)", lambda value: 0 <= value < 2**32),
        "Seed of weights, shuffling, augmentation and the random strategy"),
    Key("TRY_STEPS", 0, _NOT_NEGATIVE,
        "Steps after which to stop, to try a config out, without writing anything; 0 for a whole run"),
    Key("CHECKPOINT.EVERY_N_STEPS", 0, _NOT_NEGATIVE,
        "Steps from one writing of last.ckpt to the next within an epoch; 0 for its end only"),
    Key("CHECKPOINT.EVERY_MINUTES", 0.0, _NOT_NEGATIVE,
        "Minutes from one writing of last.ckpt to the next within an epoch; 0 for its end only"),
    Key("TRAIN.PATH", "", _ANYTHING,
        'Image folder, PATH/<class>/<image>; "" downloads what can be downloaded (cifar10, cifar100)', needs=(_FILES,),
        is_path=True),
    Key("TRAIN.CROP", "none", _one_of(CROPS),
        "pad (reflect by 4, random crop), random_resized (a random part, resized) or none"),
    Key("TRAIN.CROP_SCALE", [0.08, 1.0], _SHARE,
        "Smallest and largest part of the area that random_resized takes", needs=(_RESIZED,)),
    Key("TRAIN.FLIP", False, _ANYTHING, "Flip left and right at random"),
    Key("TRAIN.AUTO_AUGMENT", "", _one_of(AUTO_AUGMENTS),
        "randaugment, trivialaugment, or AutoAugment's policy for a data set (imagenet, cifar10, svhn); \"\" for none"),
    Key("TRAIN.MAGNITUDE", 9, Allowed("in [0, 30]", lambda value: 0 <= value <= 30),
        "Strength of randaugment, 0 to 30", needs=(_RANDAUGMENT,)),
    Key("TRAIN.ERASING", 0.0, _FRACTION, "Probability that a part of the image is erased"),
    Key("TRAIN.MIXUP", 0.0, _NOT_NEGATIVE,
        "Alpha of MixUp; 0 for none; with CUTMIX, each batch takes one of the two at random"),
    Key("TRAIN.CUTMIX", 0.0, _NOT_NEGATIVE, "Alpha of CutMix; 0 for none"),
    Key("TRAIN.REPEATS", 1, _POSITIVE,
        "How often each image is drawn in a row, each time with another augmentation (repeated augmentation); the "
        "length of an epoch stays"),
    Key("TRAIN.PRECISION", "32", _one_of(("32", "tf32", "bf16", "fp16")),
        "Precision of the computation: 32, tf32 (GPU), bf16 or fp16 (GPU); the last two by autocast"),
    Key("TRAIN.COMPILE", False, _ANYTHING, "Compile the model by torch.compile"),
    Key("TRAIN.CHANNELS_LAST", False, _ANYTHING, "Images and convolutions with the channels innermost in memory"),
    Key("VAL.PATH", "", _ANYTHING, "Image folder of the validation images, as TRAIN.PATH", needs=(_FILES,),
        is_path=True),
    Key("VAL.RESIZE", 0, _NOT_NEGATIVE,
        "Shorter side before the centre crop of INPUT.SIZE; 0 resizes the whole image to INPUT.SIZE"),
    Key("INPUT.SIZE", 224, _POSITIVE, "Side of the square images that the model takes, in pixels"),
    Key("INPUT.MEAN", [0.485, 0.456, 0.406], _three("in [0, 1]", lambda value: 0 <= value <= 1),
        "Mean of each channel, of values in [0, 1]"),
    Key("INPUT.STD", [0.229, 0.224, 0.225], _three("above 0", lambda value: 0 < value < float("inf")),
        "Standard deviation of each channel, of values in [0, 1]"),
    Key("MODEL.ARCH", "resnet18", _ARCH,
        f"A torchvision classifier by name, {', '.join(TINY)}, timm/NAME, or hf/NAME (a type or a local directory)"),
    Key("MODEL.NUM_CLASSES", 1000, Allowed("at least 2", lambda value: value >= 2), "Outputs of the classifier"),
    Key("MODEL.STEM", "imagenet", _one_of(STEMS),
        "Stem of a ResNet: imagenet (7x7, stride 2, max-pool) or cifar (3x3)"),
    Key("MODEL.PRETRAINED", "", _ANYTHING,
        "Weights to start from: torchvision's or timm's name (IMAGENET1K_V1, a1_in1k) or a local file; "
        '"" starts from scratch', is_path=True),
    Key("MODEL.DROPOUT", -1.0, _RATE, "Dropout; -1 for the model's own"),
    Key("MODEL.ATTENTION_DROPOUT", -1.0, _RATE, "Dropout of attention's weights; -1 for the model's own"),
    Key("MODEL.DROP_PATH", -1.0, _RATE, "Largest rate of stochastic depth; -1 for the model's own"),
    Key("MODEL.FREEZE", [], _ANYTHING,
        "Names of parameters or modules that are not trained; * matches any part of a name"),
    Key("MODEL.SYNC_BN", False, _ANYTHING,
        "Batch normalization over all processes together (GPUs); DropIT then leaves it plain"),
    Key("MODEL.DROPIT", False, _ANYTHING, "Convert the model's layers, as DROPIT says"),
    Key("DROPIT.STRATEGY", "fastmink", _one_of(STRATEGIES),
        "What to keep: fastmink (top-k of each block), mink (top-k of the tensor), random; "
        "mink_c, random_c (channels)", needs=(_DROPIT, _DROPS)),
    Key("DROPIT.GAMMA", 0.9, _BELOW_1,
        "Fraction of the elements that is dropped, in [0, 1)", needs=(_DROPIT, _NO_BUDGET)),
    Key("DROPIT.D", 0, _NOT_NEGATIVE,
        "Elements in a block of fastmink; 0 for blocks of 256, and one block where there are no more than 16384",
        needs=(_DROPIT, _DROPS, _FASTMINK)),
    Key("DROPIT.COMPRESS", "lossless", _one_of(COMPRESS),
        "What is saved besides kept elements: none (as PyTorch does), lossless (ReLU as bits, ...), or beyond that "
        "all that nothing is dropped from in 16, 8, 4 or 2 bits", needs=(_DROPIT, _NO_BUDGET)),
    Key("DROPIT.VALUE_DTYPE", "", _one_of(("", *VALUE_DTYPES)),
        'What the kept elements are stored in where it is narrower than their dtype: bf16, int8, or "" for no other',
        needs=(_DROPIT,)),
    Key("DROPIT.BUDGET_MB", 0.0, _NOT_NEGATIVE,
        "MiB that one process's batch may save for backward: GAMMA and COMPRESS are then ignored, and each layer's "
        "gamma and bits are chosen to fit; 0 for no budget", needs=(_DROPIT,)),
    Key("DROPIT.GAMMA_MIN", 0.0, _BELOW_1, "The least gamma that a budget may choose", needs=(_DROPIT, _BUDGET)),
    Key("DROPIT.GAMMA_MAX", 0.98, _BELOW_1, "The largest gamma that a budget may choose", needs=(_DROPIT, _BUDGET)),
    Key("DROPIT.PROBE_EVERY", 0, _NOT_NEGATIVE,
        "Steps from one comparison with the exact gradients to the next, each of which takes a step more; 0 for none",
        needs=(_DROPIT,)),
    Key("DROPIT.SKIP", [], _ANYTHING, "Names of layers to leave plain; * matches any part of a name", needs=(_DROPIT,)),
    Key("DATALOADER.NUM_WORKERS", 4, _NOT_NEGATIVE, "Processes that load images, for each training process"),
    Key("DATALOADER.TIMEOUT", 5.0, _NOT_NEGATIVE,
        "Minutes that a batch of the loader processes is waited for; 0 for ever", needs=(_WORKERS,)),
    Key("DATALOADER.CACHE", False, _ANYTHING, "Keep the decoded images in memory, in uint8; they must be of one size"),
    Key("DATALOADER.ON_DEVICE", False, _ANYTHING, "Crop by pad, flip and normalize whole batches on the device"),
    Key("DATALOADER.UNREADABLE", "fail", _one_of(UNREADABLE),
        "What to do about an image that cannot be read: fail, or skip (another one replaces it)",
        needs=(_FILES, _FOLDER)),
    Key("SOLVER.BATCH_SIZE", 128, _POSITIVE, "Samples in a step, over all processes and accumulated batches"),
    Key("SOLVER.ACCUMULATE", 1, _POSITIVE, "Batches of each process whose gradients add up to one step"),
    Key("SOLVER.OPTIMIZER", "sgd", _one_of(OPTIMIZERS), "sgd or adamw"),
    Key("SOLVER.LR", 0.1, _ABOVE_0, "Learning rate"),
    Key("SOLVER.MOMENTUM", 0.9, _FRACTION, "Momentum of sgd", needs=(_SGD,)),
    Key("SOLVER.BETAS", [0.9, 0.999], _BETAS, "Decays of adamw's two averages", needs=(_ADAMW,)),
    Key("SOLVER.WEIGHT_DECAY", 0.0, _NOT_NEGATIVE,
        "L2 penalty of sgd, decoupled decay of adamw; on every parameter but those of NO_DECAY"),
    Key("SOLVER.NO_DECAY", [], Allowed(f"of {', '.join(NO_DECAY)}", lambda value: set(value) <= set(NO_DECAY)),
        "Kinds of parameters without weight decay: norm, bias, position (embeddings and tokens)", needs=(_DECAY,)),
    Key("SOLVER.LAYER_DECAY", 1.0, _FACTOR,
        "Factor of the learning rate from each block to the block before it, for fine-tuning"),
    Key("SOLVER.SCHEDULE", "multistep", _one_of(SCHEDULES), "multistep or cosine (to MIN_LR at MAX_EPOCHS)"),
    Key("SOLVER.MIN_LR", 0.0, _NOT_NEGATIVE, "Least learning rate"),
    Key("SOLVER.GAMMA", 0.1, _FRACTION, "Factor of multistep", needs=(_MULTISTEP, _MILESTONES)),
    Key("SOLVER.MILESTONES", [], _EPOCHS,
        "Epochs at which multistep applies GAMMA", needs=(_MULTISTEP,), element=int),
    Key("SOLVER.WARMUP_EPOCHS", 0, _NOT_NEGATIVE, "Epochs over which the rate rises from WARMUP_FACTOR * LR to LR"),
    Key("SOLVER.WARMUP_FACTOR", 0.1, _FACTOR, "Where the warm-up starts, as a part of LR", needs=(_WARMUP,)),
    Key("SOLVER.MAX_EPOCHS", 90, _POSITIVE, "Epochs to train"),
    Key("SOLVER.CLIP_NORM", 0.0, _NOT_NEGATIVE, "Largest norm of all gradients together; 0 for none"),
    Key("SOLVER.LABEL_SMOOTHING", 0.0, _BELOW_1, "Part of each label that is spread over all classes"),
    Key("SOLVER.EMA", 0.0, _BELOW_1,
        "Decay of the moving average of the weights, which is then evaluated and kept; 0 for none"),
)
# fmt: on
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
