"""Random networks, trained in random ways: converted they come to what plain ones do, or raise where these do."""

import os

import pytest
import torch

from tests.fuzz.oracle import judge
from tests.fuzz.search import failures

CHUNK = 100
MANY = int(os.environ.get("FUZZ_SEEDS", "50000"))  # of the slow test


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
@pytest.mark.usefixtures("_one_thread")
def test_two_thousand_random_networks(first):
    found = [failure for seed in range(first, first + CHUNK) for failure in judge(seed)]
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.timeout(3 * 60 * 60)
def test_fifty_thousand_random_networks():
    found = [failure for chunk in failures(range(2000, 2000 + MANY), 2) for failure in chunk]
    assert not found, "\n".join(map(str, found))
