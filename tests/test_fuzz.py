"""Random networks, plain and converted: the fuzzer in tests/fuzz, and that it can find something."""

import copy
import os

import pytest
import torch

from dropit.layers.relu import DropITReLUFunction
from tests.fuzz import search
from tests.fuzz.oracle import equal, judge
from tests.fuzz.training import random_case, train

PROCESSES = min(2, os.cpu_count() or 1)
SEEDS = range(2000)
MORE = range(3000, 3000 + int(os.environ.get("FUZZ_SEEDS", "50000")))
CHUNK = 100

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def searches():
    """What each chunk of the seeds gives, all under way at once."""
    with search.pool(PROCESSES) as workers:
        yield {first: workers.submit(search.judge_all, range(first, first + CHUNK)) for first in SEEDS[::CHUNK]}
        workers.shutdown(cancel_futures=True)


@pytest.mark.parametrize("first", SEEDS[::CHUNK])
def test_random_networks_train_as_plain_ones(searches, first):
    found = searches[first].result()
    assert not found, "\n" + "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.parametrize("first", MORE[::5000])
def test_fifty_thousand_random_networks_train_as_plain_ones(first):
    seeds = range(first, min(first + 5000, MORE.stop))
    found = [failure for chunk in search.failures(seeds, PROCESSES) for failure in chunk]
    assert not found, "\n" + "\n".join(map(str, found))


def test_the_same_seed_gives_the_same_training():
    for seed in range(100):
        first, second = train(random_case(seed)), train(copy.deepcopy(random_case(seed)))
        assert bool(first.error) == bool(second.error)
        assert all(map(equal, first.outputs, second.outputs))
        assert first.gradients.keys() == second.gradients.keys()
        assert all(equal(grad, second.gradients[name]) for name, grad in first.gradients.items())


def test_most_random_networks_have_gradients_to_compare():
    records = [train(random_case(seed)) for seed in range(200)]
    assert sum(bool(record.gradients) for record in records) > 150
    assert sum(bool(record.error) for record in records) < 50


def test_a_gradient_that_is_off_is_found(monkeypatch):
    backward = DropITReLUFunction.backward
    monkeypatch.setattr(DropITReLUFunction, "backward", lambda ctx, grad: backward(ctx, grad * 1.01))
    found = [failure for seed in range(60) for failure in judge(seed) if "gradient" in failure.reason]
    assert {"lossless", "int16"} <= {failure.mode for failure in found}
