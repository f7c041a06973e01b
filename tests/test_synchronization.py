"""No operation has the host wait for a GPU. Shown without one: tensors that have no elements cannot be waited for."""

import json
import os
import sys

import pytest

from tests import processes

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def steps():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.synchronization"]
    done = processes.run(command, env=environment, check=True, cwd=processes.ROOT)
    return json.loads(done.stdout)


def test_a_step_waits_for_no_element(steps):
    """Of layers and functions of all families, by each strategy, in each form."""
    assert len(steps) > 200
    assert not {step["case"]: step["waits"] for step in steps if step["waits"]}


def test_what_is_quantized_is_so_by_the_operators_of_the_kernels(steps):
    quantized = {step["case"]: step["quantized"] for step in steps if step["compress"].startswith("int")}
    assert min(quantized.values()) > 0
    # More than the inputs of its three Linears.
    assert min(count for case, count in quantized.items() if case.startswith("functions")) > 6
