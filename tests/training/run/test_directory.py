import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from dropit.training.errors import SetupError
from dropit.training.run.directory import RunDirectory


def hold(path, ready, leave):
    """In another process: hold the directory until told to leave."""
    held = RunDirectory.take_up(path)
    ready.set()
    leave.wait()
    del held


@pytest.fixture
def other_process(tmp_path):
    """A process that holds version_0."""
    (tmp_path / "version_0").mkdir()
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "version_0", ready, leave), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    leave.set()
    process.join()


def test_each_run_gets_the_next_number(tmp_path):
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_new").mkdir()
    assert [RunDirectory.claim(tmp_path).path.name for _ in range(3)] == ["version_8", "version_9", "version_10"]


def test_no_two_runs_get_one_number(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: RunDirectory.claim(tmp_path / "a" / "b").path.name, range(64)))
    assert sorted(claimed, key=lambda name: int(name[8:])) == [f"version_{number}" for number in range(64)]


def test_a_run_that_still_runs_is_not_resumed(tmp_path, other_process):
    with pytest.raises(SetupError, match=r"version_0 is written to by another train.py, which still runs"):
        RunDirectory.take_up(tmp_path / "version_0")


def test_one_that_was_killed_is(tmp_path, other_process):
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.join()
    assert RunDirectory.take_up(tmp_path / "version_0").path == tmp_path / "version_0"


def test_only_a_new_one_without_a_checkpoint_is_discarded(tmp_path):
    RunDirectory.claim(tmp_path).discard()
    assert list(tmp_path.iterdir()) == []
    kept = RunDirectory.claim(tmp_path)
    (kept.path / "checkpoints").mkdir()
    (kept.path / "checkpoints" / "last.ckpt").touch()
    kept.discard()
    RunDirectory.take_up(kept.path).discard()
    assert kept.path.exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"OUTPUT_DIR: cannot write to .*/file/a: Not a directory"):
        RunDirectory.claim(tmp_path / "file" / "a")
    with pytest.raises(SetupError, match=r"OUTPUT_DIR: cannot write to .*: File name too long"):
        RunDirectory.claim(tmp_path / ("a" * 5000))
