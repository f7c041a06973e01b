import sys
from pathlib import Path

import pytest
import torch

import train
from dropit.training.checkpoint.files import find_damage
from dropit.training.checkpoint.writer import CheckpointWriter
from tests import processes
from tests.training.outcome import failure

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("key", "kept", "other"), [("DROPIT.GAMMA", "0.9", "0.7"), ("SOLVER.OPTIMIZER", "sgd", "adamw")]
)
def test_a_resume_under_another_gamma_or_optimizer_is_refused(config, capsys, key, kept, other):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    capsys.readouterr()
    code, line = failure(capsys, "--cfg", config, "--resume", key, other)
    assert code == 2
    assert f"checkpoint {key} {kept}, config {other}" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>", b"version https://git-lfs", b"\x80\x02."])
def test_a_broken_checkpoint_is_refused(config, capsys, content):
    Path("broken.ckpt").write_bytes(content)
    code, line = failure(capsys, "--cfg", config, "--resume", "CKPT", "broken.ckpt")
    assert code == 1
    assert "broken.ckpt" in line


def flip_a_bit(path):
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(config, capsys):
    arguments = ["--cfg", config, "SOLVER.MAX_EPOCHS", "2"]
    assert train.main(arguments) == 0
    directory = Path("outputs/few/vit/version_0/checkpoints")
    flip_a_bit(directory / "last.ckpt")
    capsys.readouterr()
    for mode in (["--resume"], ["--mode", "eval"]):
        code, line = failure(capsys, *arguments, *mode, "CKPT", str(directory / "last.ckpt"))
        assert code == 1
        assert "last.ckpt: damaged, its checksum does not match; beside it best.ckpt would do" in line
    assert train.main([*arguments, "--resume", "SOLVER.MAX_EPOCHS", "3"]) == 0
    assert (
        f"does not match; beside it best.ckpt would do; going on from {directory / 'best.ckpt'}"
        in capsys.readouterr().err
    )
    assert torch.load(directory / "last.ckpt", weights_only=True)["epoch"] == 2


def test_what_another_program_saved_is_no_checkpoint_to_go_on_from(config, capsys):
    torch.save({"state_dict": {}, "config": "SEED: 1"}, "other.ckpt")
    code, line = failure(capsys, "--cfg", config, "--resume", "CKPT", "other.ckpt")
    assert code == 1
    assert "other.ckpt: not a checkpoint of train.py" in line


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_checkpoint_with_code_is_refused_and_not_run_whatever_its_checksum(config, capsys):
    CheckpointWriter().save_checkpoint({"state_dict": Hostile(), "config": "SEED: 1"}, "hostile.ckpt")
    for mode in (["--resume"], ["--mode", "eval"]):
        code, line = failure(capsys, "--cfg", config, *mode, "CKPT", "hostile.ckpt")
        assert code == 1
        assert "hostile.ckpt: refused, it holds" in line
    assert not Path("ran").exists()


def test_a_full_disk_ends_the_run_in_one_line(config, capsys):
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1"]) == 0
    last = Path("outputs/few/vit/version_0/checkpoints/last.ckpt")
    command = f"ulimit -f 1000; exec {sys.executable} {ROOT / 'train.py'} --cfg {config} --resume"  # blocks of 1 KiB
    done = processes.run(["bash", "-c", command])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert not find_damage(last)
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not list(last.parent.glob("*.part"))
