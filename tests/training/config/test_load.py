import pytest
from yacs.config import CfgNode

from dropit.training.config.keys import defaults, flatten
from dropit.training.config.load import load
from dropit.training.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text, name="cfg.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def refusal(write):
    """The one line that a config text, or overrides to an empty one, is refused with."""

    def refusal(text="SEED: 1\n", *overrides):
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load(path, overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(str(path.parent) + "/", "")

    return refusal


def test_a_file_changes_only_what_it_names(write):
    cfg = flatten(load(write("SOLVER:\n  LR: 0.5\n")))
    assert cfg.pop("SOLVER.LR") == 0.5
    expected = flatten(defaults())
    del expected["SOLVER.LR"]
    assert cfg == expected


def test_overrides_come_last_with_or_without_equals(write):
    path = write("SOLVER:\n  LR: 0.5\n")
    cfg = load(path, ["SOLVER.LR", "0.25", "DROPIT.GAMMA=0.7", "MODEL.PRETRAINED", ""])
    assert (cfg.SOLVER.LR, cfg.DROPIT.GAMMA, cfg.MODEL.PRETRAINED) == (0.25, 0.7, "")


def test_a_base_is_read_first_from_beside_the_file(write, tmp_path):
    (tmp_path / "below").mkdir()
    write("SOLVER: {LR: 0.5, MAX_EPOCHS: 7}\n", "below/base.yaml")
    cfg = load(write("SOLVER: {LR: 0.25}\n_BASE_: below/base.yaml\n"))
    assert (cfg.SOLVER.LR, cfg.SOLVER.MAX_EPOCHS) == (0.25, 7)


def test_the_config_is_frozen(write):
    cfg = load(write("SEED: 1\n"))
    with pytest.raises(AttributeError):
        cfg.SOLVER.LR = 1.0


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.LR", "1", 1.0),
        ("SOLVER.WEIGHT_DECAY", "5e-4", 5e-4),
        ("SOLVER.MAX_EPOCHS", "1e2", 100),
        ("SOLVER.MAX_EPOCHS", "30.0", 30),
        ("MODEL.DROPIT", "true", True),
        ("MODEL.DROPIT", "no", False),
        ("MODEL.DROPIT", "On", True),
        ("TRAIN.PATH", "no", "no"),
        ("TRAIN.PATH", "10", "10"),
        ("TRAIN.PATH", "2024", "2024"),
        ("TRAIN.PATH", "None", "None"),
        ("SOLVER.MILESTONES", "[60, 120]", [60, 120]),
        ("SOLVER.MILESTONES", "60,120", [60, 120]),
        ("SOLVER.MILESTONES", "60", [60]),
        ("SOLVER.MILESTONES", "[]", []),
        ("DROPIT.SKIP", "[conv1, 'layer1.*']", ["conv1", "layer1.*"]),
    ],
)
def test_values_are_read_by_the_type_of_the_key(write, key, text, value):
    section, _, name = key.rpartition(".")
    in_file = load(write(f"{section}:\n  {name}: {text}\n"))
    on_the_command_line = load(write("SEED: 1\n"), [key, text])
    for cfg in (in_file, on_the_command_line):
        got = flatten(cfg)[key]
        assert got == value
        assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DROPIT:\n  GAMMA: 7.0\n", "DROPIT.GAMMA must be in [0, 1), got 7.0 (cfg.yaml:2)"),
        ("DROPIT:\n  GAMMA: .nan\n", "DROPIT.GAMMA must be a number, got '.nan' (cfg.yaml:2)"),
        ("DROPIT:\n  GAMMA: nan\n", "DROPIT.GAMMA must be in [0, 1), got nan (cfg.yaml:2)"),
        ("DROPIT:\n  GAMMA: '0.9'\n", "DROPIT.GAMMA must be a number, got '0.9' (cfg.yaml:2)"),
        ("DROPIT:\n  GAMMA: -0.1\n", "DROPIT.GAMMA must be in [0, 1), got -0.1 (cfg.yaml:2)"),
        ("DROPIT:\n  GAMA: 0.9\n", "DROPIT.GAMA: no such key; did you mean GAMMA? (cfg.yaml:2)"),
        ("MODEL:\n  DROPIN: true\n", "MODEL.DROPIN: no such key; did you mean DROPIT? (cfg.yaml:2)"),
        ("dropit:\n  GAMMA: 0.9\n", "dropit: no such key; did you mean DROPIT? (cfg.yaml:1)"),
        ("SEED: 1\nQQ: 2\n", "QQ: no such key (cfg.yaml:2)"),
        ("DROPIT: 0.9\n", "DROPIT is a section: expected its keys, got '0.9' (cfg.yaml:1)"),
        ("SEED: {A: 1}\n", "SEED must be an integer, got a mapping (cfg.yaml:1)"),
        ("SOLVER:\n  MAX_EPOCHS: 1.5\n", "SOLVER.MAX_EPOCHS must be an integer, got '1.5' (cfg.yaml:2)"),
        ("SOLVER:\n  MAX_EPOCHS: -3\n", "SOLVER.MAX_EPOCHS must be at least 1, got -3 (cfg.yaml:2)"),
        ("SOLVER:\n  MAX_EPOCHS: inf\n", "SOLVER.MAX_EPOCHS must be an integer, got 'inf' (cfg.yaml:2)"),
        ("MODEL:\n  DROPIT: maybe\n", "MODEL.DROPIT must be true or false, got 'maybe' (cfg.yaml:2)"),
        ("SEED: 1\nSEED: 2\n", "SEED is given twice (cfg.yaml:2, and first cfg.yaml:1)"),
        ("SEED:\n", "SEED has no value (cfg.yaml:1)"),
        ("TRAIN:\n  PATH: null\n", "TRAIN.PATH has no value (cfg.yaml:2)"),
        ("", "cfg.yaml: the file is empty"),
        ("# nothing\n", "cfg.yaml: the file is empty"),
        ("- SEED\n", "cfg.yaml:1: expected KEY: value lines"),
        ("SOLVER:\n\tLR: 1\n", "cfg.yaml:2: found character '\\t' that cannot start any token"),
        ("SOLVER: {LR: 1\n", "cfg.yaml:2: expected ',' or '}', but got '<stream end>'"),
        ("? [a]\n: 1\n", "a key must be a name, got a list (cfg.yaml:1)"),
        ("SOLVER:\n  MILESTONES: [60, x]\n", "SOLVER.MILESTONES must be an integer, got 'x' (cfg.yaml:2)"),
        (
            "SOLVER:\n  MILESTONES: [60, 30]\n",
            "SOLVER.MILESTONES must be increasing epochs, from 1 on, got [60, 30] (cfg.yaml:2)",
        ),
        ("INPUT:\n  MEAN: [0.5]\n", "INPUT.MEAN must be three numbers in [0, 1], got [0.5] (cfg.yaml:2)"),
        (
            "DROPIT:\n  STRATEGY: topk\n",
            "DROPIT.STRATEGY must be one of fastmink, mink, random, mink_c, random_c, got 'topk' (cfg.yaml:2)",
        ),
        (
            "MODEL:\n  ARCH: resnet19\n",
            "MODEL.ARCH must be a torchvision classifier, vit_tiny, vit_conv, resnet_tiny, resnet20, timm/NAME or "
            "hf/NAME; did you mean",
        ),
        ("DATASET: mnist\n", "DATASET must be one of digits, cifar10, cifar100, imagenet, folder, fake, got"),
        ("ACCELERATOR: tpu\n", "ACCELERATOR must be one of auto, gpu, cpu, got 'tpu' (cfg.yaml:1)"),
        ("NUM_GPUS: 3\n", "SOLVER.BATCH_SIZE must be a multiple of NUM_NODES * NUM_GPUS * SOLVER.ACCUMULATE (3)"),
        ("_BASE_: cfg.yaml\n", "cfg.yaml: _BASE_ leads back to this file"),
        ("_BASE_: [a]\n", "_BASE_ must be the path of a YAML file (cfg.yaml:1)"),
        ("_BASE_: other.yaml\n", "other.yaml: no such file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_says_where(refusal, text, message):
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.LR"], "SOLVER.LR has no value (overrides are KEY VALUE pairs)"),
        (["SOLVER.LR", "0.1", "SEED"], "SEED has no value"),
        (["SOLVER.LR", "fast"], "SOLVER.LR must be a number, got 'fast' (command line)"),
        (["SOLVER.RATE=1"], "SOLVER.RATE: no such key (command line)"),
        (["SOLVER.LR.X", "1"], "SOLVER.LR.X: no such key (command line)"),
        (["DROPIT.GAMMA", "7"], "DROPIT.GAMMA must be in [0, 1), got 7.0 (command line)"),
        (["SOLVER.MILESTONES", "[60"], "SOLVER.MILESTONES: cannot read '[60' (command line)"),
        (["SOLVER", "1"], "SOLVER is a section"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(refusal, overrides, message):
    assert refusal("SEED: 1\n", *overrides).startswith(message)


@pytest.mark.parametrize("name", ["cfg.py", "cfg", "http://host/cfg.py", "cfg.json"])
def test_only_yaml_files_are_read_and_nothing_is_run(tmp_path, name):
    marker = tmp_path / "ran"
    (tmp_path / "cfg.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ConfigError, match=r"a config is a local \.yaml or \.yml file"):
        load(tmp_path / name if "://" not in name else name)
    assert not marker.exists()


def test_tags_that_would_build_objects_are_only_text(refusal):
    assert "LR must be a number" in refusal("SOLVER:\n  LR: !!python/object/apply:os.getpid []\n")


def test_a_missing_file_names_the_nearest(write):
    path = write("SEED: 1\n", "vit_tiny.yaml")
    with pytest.raises(ConfigError, match=r"vit_tyni.yaml: no such file; did you mean vit_tiny.yaml\?"):
        load(path.with_name("vit_tyni.yaml"))


def test_a_dump_reads_back(write):
    cfg = load(write("SOLVER:\n  MILESTONES: [3, 4]\n"))
    assert flatten(CfgNode.load_cfg(cfg.dump())) == flatten(cfg)
