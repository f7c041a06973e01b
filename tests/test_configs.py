"""Every config that ships: it loads, and builds its model, optimizer and schedule."""

import re
from pathlib import Path

import pytest
import torch

import dropit
from dropit.training.builders.data import build_data
from dropit.training.builders.model import build_module
from dropit.training.config.check import ineffective
from dropit.training.config.keys import KEYS, flatten
from dropit.training.config.load import load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DROPPING = [path for path in CONFIGS if "fastmink" in path.name]
BUDGETS = [path for path in CONFIGS if path.stem.endswith("_budget")]
PUBLISHED = {"resnet18", "resnet18_fastminkx0.8", "vit_b", "vit_b_fastminkx0.9"}


def name(path):
    return f"{path.parent.name}/{path.name.removesuffix('.yaml')}"


def test_the_published_rows_and_the_digits_are_all_there():
    names = {name(path) for path in CONFIGS}
    assert {f"{data}/{row}" for data in ("cifar100", "imagenet") for row in PUBLISHED} <= names
    tiny = {"vit_tiny", "vit_tiny_fastminkx0.9", "resnet_tiny", "resnet_tiny_fastminkx0.8", "resnet_tiny_budget"}
    assert {f"digits/{row}" for row in tiny} <= names
    assert {"imagenet/deit_s", "imagenet/deit_s_fastminkx0.9_int8"} <= names
    assert all(f"{name}_int8" in names for name in names if name.split("x")[-1] in {"0.8", "0.9"})


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_builds_its_model_and_optimizer(path):
    cfg = load(path)
    with torch.device("meta"):
        classifier = build_module(cfg, convert=path in DROPPING)
    built = classifier.configure_optimizers()
    assert built["optimizer"].param_groups[0]["lr"] <= cfg.SOLVER.LR
    logits = classifier.eval()(torch.empty(2, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE, device="meta"))
    assert logits.shape == (2, cfg.MODEL.NUM_CLASSES)
    assert (dropit.coverage(classifier.model).converted > 0) == (path in DROPPING)


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_its_name_says_what_is_dropped(path):
    cfg = load(path)
    assert (path in DROPPING or path in BUDGETS) == cfg.MODEL.DROPIT
    assert (cfg.DROPIT.BUDGET_MB > 0) == (path in BUDGETS)
    if path in DROPPING:
        compress = "" if cfg.DROPIT.COMPRESS == "lossless" else f"_{cfg.DROPIT.COMPRESS}"
        assert path.stem.endswith(f"_{cfg.DROPIT.STRATEGY}x{cfg.DROPIT.GAMMA}{compress}")


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_each_of_its_keys_has_an_effect(path):
    assert ineffective(load(path)) == []


@pytest.mark.parametrize("path", [*DROPPING, *BUDGETS], ids=name)
def test_it_differs_from_its_plain_config_in_dropping_alone(path):
    plain = path.with_name(re.sub(r"_(fastmink.*|budget)\.yaml", ".yaml", path.name))
    ours = load(path)
    dropping = [f"DROPIT.{key}={value}" for key, value in ours.DROPIT.items()]
    assert ours == load(plain, ["MODEL.DROPIT", "true", *dropping])


@pytest.mark.parametrize("path", BUDGETS, ids=name)
def test_a_budget_is_met(path):
    cfg = load(path, ["ACCELERATOR", "cpu"])
    images, labels = build_data(cfg).sample()
    classifier = build_module(cfg, convert=True, sample=(images, labels)).train()
    with dropit.CacheMeter(classifier.model) as meter:
        loss = classifier.criterion(classifier(images), labels)
    assert 0.9 * cfg.DROPIT.BUDGET_MB < meter.total_bytes / 2**20 <= cfg.DROPIT.BUDGET_MB
    del loss


def test_every_key_is_used_by_a_config_or_a_test():
    used = {key for path in CONFIGS for key, value in flatten(load(path)).items() if value != KEYS[key].default}
    elsewhere = [path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "config"]
    tests = "\n".join(path.read_text() for path in elsewhere)
    assert [key for key in KEYS if key not in used and f'"{key}"' not in tests] == []


RECIPES = {
    # batch, processes, epochs, warm-up, lr, weight decay, milestones, factor, evaluated every, workers
    "cifar100/resnet18": (128, 1, 200, 0, 0.1, 5e-4, [60, 120, 160], 0.2, 1, 4),
    "cifar100/vit_b": (512, 2, 100, 10, 0.03, 0, [], None, 1, 8),
    "imagenet/resnet18": (256, 1, 90, 0, 0.1, 1e-4, [30, 60], 0.1, 10, 4),
    "imagenet/vit_b": (512, 2, 8, 1, 0.01, 0, [], None, 1, 8),
}


@pytest.mark.parametrize(("row", "recipe"), RECIPES.items(), ids=RECIPES)
def test_the_published_recipes(row, recipe):
    cfg = load(ROOT / "configs" / f"{row}.yaml")
    solver = cfg.SOLVER
    factor = solver.GAMMA if solver.SCHEDULE == "multistep" else None
    assert recipe == (
        solver.BATCH_SIZE,
        cfg.NUM_GPUS,
        solver.MAX_EPOCHS,
        solver.WARMUP_EPOCHS,
        solver.LR,
        solver.WEIGHT_DECAY,
        solver.MILESTONES,
        factor,
        cfg.CHECK_VAL_EVERY_N_EPOCH,
        cfg.DATALOADER.NUM_WORKERS,
    )
    assert (cfg.SEED, solver.MOMENTUM) == (42, 0.9)
    assert ("cosine" if "vit" in row else "multistep") == solver.SCHEDULE


def test_deit_has_the_papers_hyper_parameters():
    cfg = load(ROOT / "configs" / "imagenet" / "deit_s.yaml")
    solver, train = cfg.SOLVER, cfg.TRAIN
    assert (solver.OPTIMIZER, solver.SCHEDULE, solver.MAX_EPOCHS, solver.WARMUP_EPOCHS) == ("adamw", "cosine", 300, 5)
    assert (solver.LR, solver.WEIGHT_DECAY) == (5e-4 * solver.BATCH_SIZE / 512, 0.05)
    assert (solver.LABEL_SMOOTHING, cfg.MODEL.DROP_PATH, train.ERASING, train.REPEATS) == (0.1, 0.1, 0.25, 3)
    assert (train.AUTO_AUGMENT, train.MAGNITUDE, train.MIXUP, train.CUTMIX) == ("randaugment", 9, 0.8, 1.0)
