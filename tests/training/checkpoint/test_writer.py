import multiprocessing
import resource
import shutil
import signal
import time
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch

from dropit.training.checkpoint.files import find_damage
from dropit.training.checkpoint.writer import CheckpointWriter, check_space
from dropit.training.errors import SetupError


def state(value, size=20_000):
    return {"state_dict": {"weight": torch.full((size,), float(value))}, "epoch": value, "config": "SEED: 1"}


def write(path, value=1, **kwargs):
    CheckpointWriter().save_checkpoint(state(value, **kwargs), path)
    return path


def test_what_is_written_is_what_torch_reads(tmp_path):
    path = write(tmp_path / "new" / "last.ckpt", 7)
    assert not find_damage(path)
    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(read["state_dict"]["weight"], torch.full((20_000,), 7.0))
        assert (read["epoch"], read["config"]) == (7, "SEED: 1")
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_takes_the_place_of_the_one_before(tmp_path):
    write(tmp_path / "last.ckpt", 1)
    assert torch.load(write(tmp_path / "last.ckpt", 2), weights_only=True)["epoch"] == 2


@contextmanager
def files_of_at_most(nbytes):
    """As on a disk that is full: a larger file cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 100, 10_000, 60_000, 81_000])
def test_where_there_is_no_room_nothing_is_lost_and_nothing_left_over(tmp_path, room):
    path = write(tmp_path / "last.ckpt", 1)
    assert path.stat().st_size > 81_000
    with files_of_at_most(room), pytest.raises(SetupError) as raised:
        write(path, 2)
    assert f"{path}: cannot be written (File too large); what was saved before is as it was" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not find_damage(path)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def write_forever(path, value, begun):
    write(path, value)
    begun.send(True)
    while True:
        write(path, value)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """At 40 moments or more, of a process that does nothing but write; some of them in the middle of writing."""
    path = write(tmp_path / "last.ckpt", 0)
    generator = torch.Generator().manual_seed(0)
    kills = within = 0
    while kills < 40 or within < 4:
        kills += 1
        begun, tell = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=write_forever, args=(path, kills, tell), daemon=True)
        process.start()
        tell.close()  # or its end would not be seen below, if it came before
        assert begun.recv()
        time.sleep(0.03 * torch.rand((), generator=generator).item())
        process.kill()
        process.join()
        assert not find_damage(path)
        assert torch.load(path, weights_only=True)["epoch"] == kills
        within += path.with_suffix(".part").exists()
    write(path, -1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]  # what a killed write left is written over


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    """A GPU's often come up where its tensors are saved."""

    def save(content, file):
        file.write(b"begun")
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="device-side assert"):
        write(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_directory_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"last.ckpt: cannot be written \(\w.*\)"):
        write(tmp_path / "file" / "last.ckpt")


def test_too_little_room_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(12_000_000))
    check_space(tmp_path, 12_000_000)
    with pytest.raises(SetupError, match=rf"OUTPUT_DIR needs 15 MB for checkpoints, 12 MB free at {tmp_path}"):
        check_space(tmp_path, 15_000_000)
