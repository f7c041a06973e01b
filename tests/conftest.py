import faulthandler
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from tests import processes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when first imported, which PyTorch itself may do

os.environ.pop("PYTEST_ADDOPTS", None)  # are for this run, and not for those that tests start

TESTS = Path(__file__).parent
processes.guard_session()
# The workers of a data loader are forks by default before Python 3.14, of a process in which OpenMP's threads have run.
# Here they are forks of a fresh interpreter, which has imported what takes long and run nothing.
multiprocessing.set_start_method("forkserver", force=True)
multiprocessing.set_forkserver_preload(["torch", "torchvision", "pytorch_lightning", "dropit"])

# Whole models, trainings, processes and compilers. Marked thorough: a change to one part is tested by the other files.
THOROUGH = (
    "layers/test_callers.py",
    "layers/test_random.py",
    "test_architectures.py",
    "test_behaviour.py",
    "test_budget.py",
    "test_calibration.py",
    "test_compile.py",
    "test_configs.py",
    "test_distributed.py",
    "test_docs.py",
    "test_examples.py",
    "test_fuzz.py",
    "test_huggingface.py",
    "test_lightning.py",
    "test_packaging.py",
    "test_processes.py",
    "test_quantized_error.py",
    "test_traced.py",
    "training/builders/",
    "training/callbacks/",
    "training/checkpoint/",
    "training/data/",
    "training/model/",
    "training/run/",
    "training/test_processes.py",
)
SLOW_LIMIT = 7200  # seconds for each test marked slow; pyproject.toml has the limit of the others
GRACE = 60  # seconds more, for a test that does not let itself be stopped
STDERR = pytest.StashKey[int]()


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.path).removeprefix(f"{TESTS}/").startswith(THOROUGH):
            item.add_marker(pytest.mark.thorough)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item, settings):
    """End the whole run where the limit fails to end the test: Python's signal handlers wait for C code to return."""
    faulthandler.dump_traceback_later(settings.timeout + GRACE, exit=True, file=item.config.stash[STDERR])
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()
    return (yield)


def pytest_enter_pdb():
    faulthandler.cancel_dump_traceback_later()


def pytest_configure(config):
    """Keep the standard error that is not captured, since a run that is ended at once shows no other."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config):
    os.close(config.stash[STDERR])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
