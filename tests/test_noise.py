"""The program that holds each arm's error beside the noise of batches: its estimates, and that it runs."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests import processes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def moments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("noise").Moments()


def test_variance_and_square_of_the_mean_are_of_the_distribution_not_of_the_sample(moments):
    moments.add({"a": torch.tensor([1.0])})
    moments.add({"a": torch.tensor([3.0])})
    assert moments.variance("a") == 2
    assert moments.mean_square("a") == 5
    assert moments.square_of_mean() == 3  # 2^2, less 2 / 2 that is due to noise
    assert moments.running == [1, 16]


def test_random_vectors_of_mean_zero_show_no_bias(moments):
    torch.manual_seed(0)
    for _ in range(50):
        moments.add({"a": torch.randn(1000), "b": torch.randn(3000)})
    assert moments.variance("a") == pytest.approx(1000, rel=0.02)
    assert abs(moments.square_of_mean()) < 0.1 * 4000 / 50


@pytest.mark.slow
def test_eight_bits_are_hidden_by_the_noise_and_dropping_is_not(tmp_path):
    study = "benchmarks/studies/digits_vit.yaml"
    command = [sys.executable, "benchmarks/noise.py", study, "--output", str(tmp_path), "--quick"]
    done = processes.run(command, check=True, cwd=ROOT)
    assert "| dropping 0.9 |" in done.stdout
    for moment in json.loads((tmp_path / "digits_vit" / "noise.json").read_text())["moments"]:
        assert max(moment["arms"]["int8"]["noise"].values()) < 1e-3
        assert max(moment["arms"]["dropping 0.9"]["noise"].values()) > 0.1
    assert (tmp_path / "digits_vit" / "noise.svg").is_file()
