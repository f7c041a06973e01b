import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dropit.training.errors import SetupError
from dropit.training.run.directory import RunDirectory
from tests import processes

HOLDS = """
import sys, time
from pathlib import Path
from dropit.training.run.directory import RunDirectory

held = RunDirectory.take_up(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that holds version_0."""
    (tmp_path / "version_0").mkdir()
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "version_0")]
    with processes.started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


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
    other_process.kill()
    other_process.wait()
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
