import re
import sys
from pathlib import Path

import pytest
import torch

import train
from dropit.training.checkpoint import writer
from dropit.training.errors import ConfigError, SetupError
from dropit.training.run.start import run_dir
from tests import processes
from tests.training.outcome import failure

ROOT = Path(__file__).parents[3]


def test_a_run_is_named_after_its_config():
    assert run_dir("configs/digits/vit_tiny_fastminkx0.9.yaml", "outputs") == Path(
        "outputs/digits/vit_tiny_fastminkx0.9"
    )


BAD = {
    "unknown key": (["DROPIT.GAMA", "0.9"], 2, "did you mean GAMMA?"),
    "gamma 7": (["DROPIT.GAMMA", "7"], 2, "DROPIT.GAMMA must be in [0, 1), got 7.0 (command line)"),
    "odd overrides": (["SEED"], 2, "SEED has no value"),
    "wrong type": (["SOLVER.MAX_EPOCHS", "many"], 2, "SOLVER.MAX_EPOCHS must be an integer, got 'many'"),
    "unknown arch": (["MODEL.ARCH", "vit_tinny"], 2, "did you mean vit_tiny?"),
    "unknown data set": (["DATASET", "mnist"], 2, "DATASET must be one of digits, cifar10, cifar100, imagenet"),
    "missing data": (["TRAIN.PATH", "no/such"], 1, "TRAIN.PATH no/such is not a directory: expected"),
    "images too small": (["TRAIN.CROP", "pad", "INPUT.SIZE", "64"], 2, "TRAIN.CROP pad takes INPUT.SIZE 64"),
    "no layer converted": (["DROPIT.SKIP", "*"], 2, "converted 0 of 14"),
    "too few GPUs": (["NUM_GPUS", "2", "ACCELERATOR", "gpu"], 1, "ACCELERATOR cpu runs on the CPU"),
    "nothing to resume": (["--resume"], 1, "no checkpoint last.ckpt below"),
    "nothing to evaluate": (["--mode", "eval"], 1, "no checkpoint best.ckpt below"),
    "missing checkpoint": (["--resume", "CKPT", "no.ckpt"], 2, "CKPT no.ckpt: no such file"),
    "a checkpoint without --resume": (["CKPT", "no.ckpt"], 2, "CKPT is for --resume or --mode eval"),
    "unknown mode": (["--mode", "test"], 2, "invalid choice: 'test'"),
    "unknown flag": (["--fast"], 2, "unrecognized arguments: --fast"),
    "weights that are not there": (["MODEL.PRETRAINED", "no.pth"], 2, "MODEL.PRETRAINED must be a local file"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_an_exit_code(config, capsys, arguments, code, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    got, line = failure(capsys, "--cfg", config, *arguments)
    assert (got, message in line) == (code, True), line
    assert not Path("outputs/few/vit/version_0").exists()


def test_a_key_without_an_effect_is_one_warning_and_the_run_goes_on(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.STRATEGY", "mink", "DROPIT.D", "64"]) == 0
    warning = "train.py: warning: DROPIT.D 64 has no effect without DROPIT.STRATEGY fastmink\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize(("arguments", "message"), [([], "--cfg"), (["--cfg", "no.yaml"], "no.yaml: no such file")])
def test_without_a_config_nothing_starts(capsys, arguments, message):
    code, line = failure(capsys, *arguments)
    assert code == 2
    assert message in line


def test_a_python_config_is_refused_and_not_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cfg.py").write_text("open('ran', 'w')")
    assert failure(capsys, "--cfg", "cfg.py") == (2, "train.py: cfg.py: a config is a local .yaml or .yml file\n")
    assert not Path("ran").exists()


def test_too_little_room_is_said_before_training(config, capsys, monkeypatch):
    monkeypatch.setattr(writer, "_free", lambda path: 6_000_000)
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert re.search(r"OUTPUT_DIR needs \d+ MB for checkpoints, 6 MB free at outputs/few/vit", line)
    assert not list(Path("outputs").rglob("events*"))


def test_a_place_that_cannot_be_written_is_said_before_training(config, capsys):
    Path("outputs").write_text("a file")
    code, line = failure(capsys, "--cfg", config)
    assert code == 1
    assert "OUTPUT_DIR: cannot write to" in line


def test_debug_shows_the_traceback(config):
    with pytest.raises(ConfigError):
        train.main(["--cfg", config, "--debug", "DROPIT.GAMMA", "7"])
    with pytest.raises(SetupError):
        train.main(["--debug", "--cfg", config, "TRAIN.PATH", "no/such"])


def test_overrides_may_stand_anywhere(config, capsys):
    code, line = failure(capsys, "DROPIT.GAMMA", "7", "--cfg", config, "SEED", "1")
    assert code == 2
    assert "got 7.0" in line


def test_the_exit_code_reaches_the_shell(config):
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", config, "DROPIT.GAMMA", "7"]
    done = processes.run(command)
    assert done.returncode == 2
    assert done.stderr == "train.py: DROPIT.GAMMA must be in [0, 1), got 7.0 (command line)\n"
    assert done.stdout == ""
