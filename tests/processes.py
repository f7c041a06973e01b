"""Processes that tests start: fresh interpreters, which end with their test, however it ends.

Never forks of the process that runs the tests: a fork has one thread, and what waits for the others waits forever, as
OpenMP does once it has run. There is no timeout here either, since a busy machine breaks those: pytest limits the time
of each test, and what a test has started is ended when that is over.
"""

import atexit
import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).resolve().parent.parent
# Names, in the environment, who started a process. Unlike groups and sessions, which torchrun changes, it is inherited.
MARKS = "DROPIT_TEST_PROCESSES"
_SESSION = uuid.uuid4().hex
_numbers = itertools.count()


@contextmanager
def started(command, *, env=None, stdin=subprocess.DEVNULL, **options):
    """A running process, as subprocess.Popen gives it; in the end it is killed, and whatever it has started."""
    mark = f"{_SESSION}.{next(_numbers)};"
    env = {**(os.environ if env is None else env), MARKS: os.environ.get(MARKS, "") + mark}
    # A session of its own, so that Ctrl-C reaches pytest alone.
    with subprocess.Popen(command, env=env, stdin=stdin, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            end(mark)


def run(command, *, check=False, **options):
    """Run it to its end, as subprocess.run with its output captured; ``check`` asserts that it ends well."""
    (done,) = run_together([command], **options)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_together(commands, **options):
    """Run several at the same time, each to its end."""
    with ExitStack() as stack:
        # Files: who reads pipes to their end waits for all that have inherited them.
        outputs = [[stack.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        try:
            running = [
                stack.enter_context(started(command, stdout=stdout, stderr=stderr, **options))
                for command, (stdout, stderr) in zip(commands, outputs, strict=True)
            ]
            codes = [process.wait() for process in running]
        except BaseException:  # the test's time is over, say
            for command, texts in zip(commands, outputs, strict=True):
                print(f"{command} said until here:", *map(_read, texts), sep="\n", file=sys.stderr)
            raise
        return [
            subprocess.CompletedProcess(command, code, *map(_read, texts))
            for command, code, texts in zip(commands, codes, outputs, strict=True)
        ]


def end(mark):
    """Kill the processes that carry the mark, until there are none."""
    while found := list(_marked(mark)):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark):
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environment.read_bytes():
                yield int(environment.parent.name)


def _read(file):
    file.seek(0)
    return file.read()


def guard_session():
    """Start a process that outlives this one, and then ends all that this one has started, in whatever way, after this.

    Killed by SIGKILL it could not do so itself, and the workers of a data loader would wait for it forever.
    """
    command = [sys.executable, "-I", "-S", __file__, _SESSION]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **quiet)
    atexit.register(guard.communicate)
    resource_tracker.ensure_running()  # before: it ends by itself, after it has cleaned up
    os.environ[MARKS] = f"{os.environ.get(MARKS, '')}{_SESSION};"


if __name__ == "__main__":
    sys.stdin.read()  # ends with who started this
    end(sys.argv[1])
