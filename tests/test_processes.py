"""No process outlives the test that started it, and none is a fork of one in which threads have run."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = processes.ROOT
PARTS = ("benchmarks", "dropit", "examples", "tests")
CODE = {path for part in PARTS for path in (ROOT / part).rglob("*.py")} | {ROOT / "train.py"}
CODE -= {Path(__file__).resolve(), ROOT / "tests" / "processes.py"}  # whose matter it is
FORKS = re.compile(r"os\.fork|forkpty|[\"'](ddp_)?(fork|notebook)(_\w+)?[\"']")
STARTS = re.compile(
    r"subprocess\.(run|call|check_\w+|Popen)\(|mp\.spawn|start_processes|os\.(system|popen|spawn)|timeout=\d"
)
# Opens a pipe by its name, in a process that has another session, says so, and keeps it open.
HOLD = """
import subprocess, sys
hold = "import sys, time; file = open(sys.argv[1], 'w'); print('open', file=file, flush=True); time.sleep(10**6)"
subprocess.run([sys.executable, "-c", hold, sys.argv[1]], start_new_session=True)
"""


@pytest.mark.parametrize("path", sorted(CODE), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_forks(path):
    """But for what shows that a fork packs, in an interpreter of its own."""
    found = [line for line in path.read_text().splitlines() if FORKS.search(line)]
    assert found == (["process = os.fork()"] if path.name == "test_cpu.py" else [])


@pytest.mark.parametrize(
    "path", sorted(CODE.intersection((ROOT / "tests").rglob("*.py"))), ids=lambda path: str(path.relative_to(ROOT))
)
def test_processes_are_started_by_what_ends_them(path):
    found = [line for line in path.read_text().splitlines() if STARTS.search(line)]
    assert not found, "tests/processes.py ends what it has started, and has no timeout that a busy machine breaks"


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def until_open(pipe):
    """The pipe, once HOLD has opened it; reading it then ends when HOLD has."""
    file = pipe.open()
    assert file.readline() == "open\n"
    return file


@pytest.mark.parametrize("parent", ["lives", "is gone"])
def test_what_a_process_has_started_ends_with_it(pipe, parent):
    with processes.started([sys.executable, "-c", HOLD, str(pipe)]) as process:
        held = until_open(pipe)
        if parent == "is gone":
            process.kill()
            process.wait()
    assert held.read() == ""


def pytest_of_one_test(directory, body):
    """A command that runs it as the tests here are run."""
    path = directory / "test_it.py"
    path.write_text(f"import signal, sys, time\nfrom tests import conftest, processes\n{body}")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    return [sys.executable, "-m", "pytest", *options, str(path)]


# SIGALRM is what comes when the test's time is over.
@pytest.mark.parametrize("signum", ["SIGALRM", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_test_that_is_ended(tmp_path, pipe, signum):
    test = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs ignore
        f"def test_it():\n    processes.run([sys.executable, '-c', {HOLD!r}, {str(pipe)!r}])"
    )
    with processes.started(pytest_of_one_test(tmp_path, test), cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        held = until_open(pipe)
        run.send_signal(getattr(signal, signum))
        assert held.read() == ""
        said = run.stdout.read()
    assert ("Failed: Timeout" in said and "said until here" in said) == (signum == "SIGALRM")


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_test_with_workers(tmp_path, pipe, signum):
    """Which are children of another process, that lives as long as they do."""
    hold = f"import time; file = open({str(pipe)!r}, 'w'); print('open', file=file, flush=True); time.sleep(10**6)"
    test = f"import multiprocessing\ndef test_it():\n    multiprocessing.Process(target=exec, args=({hold!r},)).start()"
    command = pytest_of_one_test(tmp_path, f"{test}\n    time.sleep(10**6)")
    with processes.started(command, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        held = until_open(pipe)
        run.send_signal(getattr(signal, signum))
        assert held.read() == ""


def test_a_test_that_cannot_be_stopped_ends_the_run(tmp_path):
    """As in C code that does not return; here the signal does not come through."""
    test = (
        "conftest.GRACE = 0.1\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "def test_it():\n    time.sleep(10**6)"
    )
    done = processes.run([*pytest_of_one_test(tmp_path, test), "--timeout", "0.1"], cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r'test_it.py", line \d+ in test_it', done.stderr)
