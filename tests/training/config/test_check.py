import pytest

from dropit.training.config.check import ineffective
from dropit.training.config.load import load

DROPIT = ["MODEL.DROPIT", "true"]


@pytest.fixture
def lines(tmp_path):
    """What is said of the config of these overrides."""
    (tmp_path / "cfg.yaml").write_text("SEED: 1\n")
    return lambda *overrides: ineffective(load(tmp_path / "cfg.yaml", overrides))


@pytest.mark.parametrize(
    ("ignored", "otherwise", "remedy"),
    [
        (["DROPIT.D", "64"], "without DROPIT.STRATEGY fastmink", ["DROPIT.STRATEGY", "fastmink"]),
        (["DROPIT.D", "64"], "without a DROPIT.GAMMA above 0", ["DROPIT.GAMMA", "0.5"]),
        (["DROPIT.GAMMA", "0.8"], "with DROPIT.BUDGET_MB, which chooses for each layer", ["DROPIT.BUDGET_MB", "0"]),
        (["DROPIT.GAMMA_MIN", "0.5"], "without DROPIT.BUDGET_MB", ["DROPIT.BUDGET_MB", "1"]),
        (["DROPIT.SKIP", "conv1"], "without MODEL.DROPIT true", DROPIT),
        (["SOLVER.BETAS", "0.8,0.9"], "without SOLVER.OPTIMIZER adamw", ["SOLVER.OPTIMIZER", "adamw"]),
        (["SOLVER.MOMENTUM", "0.8"], "without SOLVER.OPTIMIZER sgd", ["SOLVER.OPTIMIZER", "sgd"]),
        (["SOLVER.NO_DECAY", "norm"], "without SOLVER.WEIGHT_DECAY", ["SOLVER.WEIGHT_DECAY", "0.1"]),
        (["SOLVER.GAMMA", "0.2"], "without SOLVER.MILESTONES", ["SOLVER.MILESTONES", "3"]),
        (["SOLVER.MILESTONES", "3"], "without SOLVER.SCHEDULE multistep", ["SOLVER.SCHEDULE", "multistep"]),
        (["SOLVER.WARMUP_FACTOR", "0.5"], "without SOLVER.WARMUP_EPOCHS", ["SOLVER.WARMUP_EPOCHS", "1"]),
        (["TRAIN.MAGNITUDE", "5"], "without TRAIN.AUTO_AUGMENT randaugment", ["TRAIN.AUTO_AUGMENT", "randaugment"]),
        (["TRAIN.CROP_SCALE", "0.5,1"], "without TRAIN.CROP random_resized", ["TRAIN.CROP", "random_resized"]),
        (["TRAIN.PATH", "images"], "with DATASET fake", ["DATASET", "folder"]),
        (["DATALOADER.UNREADABLE", "skip"], "without TRAIN.PATH or VAL.PATH", ["TRAIN.PATH", "images"]),
        (["PARALLEL", "fsdp"], "in a single process", ["NUM_GPUS", "2"]),
    ],
)
def test_a_key_without_an_effect_is_named_with_the_reason(lines, ignored, otherwise, remedy):
    without = {
        "without DROPIT.STRATEGY fastmink": [*DROPIT, "DROPIT.STRATEGY", "mink"],
        "without a DROPIT.GAMMA above 0": [*DROPIT, "DROPIT.GAMMA", "0"],
        "with DROPIT.BUDGET_MB, which chooses for each layer": [*DROPIT, "DROPIT.BUDGET_MB", "1"],
        "without DROPIT.BUDGET_MB": DROPIT,
        "without SOLVER.OPTIMIZER sgd": ["SOLVER.OPTIMIZER", "adamw"],
        "without SOLVER.SCHEDULE multistep": ["SOLVER.SCHEDULE", "cosine"],
        "with DATASET fake": ["DATASET", "fake"],
    }.get(otherwise, [])
    (line,) = lines(*without, *ignored)
    assert line.startswith(f"{ignored[0]} ")
    assert line.endswith(f" has no effect {otherwise}")
    assert lines(*without, *ignored, *remedy) == []


def test_keys_with_one_reason_share_a_line(lines):
    (line,) = lines("DROPIT.GAMMA", "0.8", "DROPIT.COMPRESS", "int8")
    assert line == "DROPIT.GAMMA 0.8, DROPIT.COMPRESS int8 have no effect without MODEL.DROPIT true"


def test_a_key_that_is_set_to_its_default_is_not_named(lines):
    assert lines("DROPIT.GAMMA", "0.9", "SOLVER.GAMMA", "0.1", "TRAIN.MAGNITUDE", "9") == []
