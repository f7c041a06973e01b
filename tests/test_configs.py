"""Every config that ships: it loads, and builds its model, optimizer and schedule."""

from pathlib import Path

import pytest
import torch

import dropit
from dropit.training.builders.model import build_module
from dropit.training.config.load import load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PUBLISHED = {"resnet18", "resnet18_fastminkx0.8", "vit_b", "vit_b_fastminkx0.9"}


def name(path):
    return f"{path.parent.name}/{path.name.removesuffix('.yaml')}"


def test_the_published_rows_and_the_digits_are_all_there():
    names = {name(path) for path in CONFIGS}
    assert {f"{data}/{row}" for data in ("cifar100", "imagenet") for row in PUBLISHED} <= names
    tiny = {"vit_tiny", "vit_tiny_fastminkx0.9", "resnet_tiny", "resnet_tiny_fastminkx0.8"}
    assert {f"digits/{row}" for row in tiny} <= names
    assert all(f"{name}_int8" in names for name in names if name.split("x")[-1] in {"0.8", "0.9"})


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_it_builds_its_model_and_optimizer(path):
    cfg = load(path)
    with torch.device("meta"):
        classifier = build_module(cfg, convert=cfg.MODEL.DROPIT)
    built = classifier.configure_optimizers()
    assert built["optimizer"].param_groups[0]["lr"] <= cfg.SOLVER.LR
    logits = classifier.eval()(torch.empty(2, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE, device="meta"))
    assert logits.shape == (2, cfg.MODEL.NUM_CLASSES)
    converted = dropit.coverage(classifier.model).converted
    assert (converted > 0) == cfg.MODEL.DROPIT == ("fastmink" in path.name)
    if cfg.MODEL.DROPIT:
        compress = "" if cfg.DROPIT.COMPRESS == "lossless" else f"_{cfg.DROPIT.COMPRESS}"
        assert path.stem.endswith(f"_{cfg.DROPIT.STRATEGY}x{cfg.DROPIT.GAMMA}{compress}")


@pytest.mark.parametrize("path", [p for p in CONFIGS if "fastmink" in p.name], ids=name)
def test_it_differs_from_its_plain_config_in_dropping_alone(path):
    plain = path.with_name(path.name.split("_fastmink")[0] + ".yaml")
    ours = load(path)
    dropping = ["DROPIT.GAMMA", str(ours.DROPIT.GAMMA), "DROPIT.COMPRESS", ours.DROPIT.COMPRESS]
    assert ours == load(plain, ["MODEL.DROPIT", "true", *dropping])


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
