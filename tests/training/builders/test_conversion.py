import re
from pathlib import Path

import pytest

import dropit
import train
from dropit.training.builders.data import build_data
from dropit.training.builders.model import build_module
from dropit.training.config.load import load
from dropit.training.errors import ConfigError
from tests.training.outcome import events, failure, scalars


def test_a_budget_is_kept_and_a_probe_compares(config, capsys, recwarn):
    budget = ["DROPIT.BUDGET_MB", "1", "DROPIT.PROBE_EVERY", "2"]
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "2", *budget]) == 0
    out = capsys.readouterr().out
    assert "fastmink, 1 MiB: converted" in out
    assert re.search(r"budget +measured in \d+ steps", out)
    log = events(Path("outputs/few/vit/version_0"))
    assert 0.95 <= scalars(log, "dropit/cache_mb")[0] <= 1.01
    assert 0 < scalars(log, "probe/worst_cosine")[-1] < 1
    assert 0 < scalars(log, "probe/worst_relative_error")[-1] < 1
    assert {"probe/cosine", "probe/relative_error"} <= set(log.Tags()["histograms"])
    assert any(tag.startswith("probe/worst_layer") for tag in log.Tags()["tensors"])
    # A run that is taken up again chooses the same, and says nothing of another.
    assert train.main(["--cfg", config, "--resume", "SOLVER.MAX_EPOCHS", "3", *budget]) == 0
    assert not [warning for warning in recwarn if "was trained with" in str(warning.message)]
    assert train.main(["--cfg", config, "--mode", "eval", *budget]) == 0


def test_a_budget_that_cannot_be_met_is_one_line(config, capsys):
    code, line = failure(capsys, "--cfg", config, "DROPIT.BUDGET_MB", "0.1")
    assert code == 2
    assert "DROPIT.BUDGET_MB: budget of 0.1 MiB cannot be met" in line


@pytest.fixture
def cache(config):
    """MiB that a batch of the converted model saves for backward."""

    def cache(*overrides):
        cfg = load(config, [*overrides, "ACCELERATOR", "cpu"])
        images, labels = build_data(cfg).sample()
        classifier = build_module(cfg, convert=True, sample=(images, labels)).train()
        with dropit.CacheMeter(classifier.model) as meter:
            loss = classifier.criterion(classifier(images), labels)
        del loss
        return meter.total_bytes / 2**20

    return cache


def test_a_budget_chooses_within_the_range_of_gammas(cache):
    roomy = ["DROPIT.BUDGET_MB", "100"]
    assert cache(*roomy, "DROPIT.GAMMA_MIN", "0.8") < 0.8 * cache(*roomy)
    with pytest.raises(ConfigError, match=r"DROPIT.BUDGET_MB: .* 0.8 and 0.7"):
        cache(*roomy, "DROPIT.GAMMA_MIN", "0.8", "DROPIT.GAMMA_MAX", "0.7")


def test_kept_values_are_stored_in_their_dtype(cache):
    assert cache("DROPIT.VALUE_DTYPE", "bf16") < cache() - 0.1


def test_a_budget_without_the_batch_that_it_is_for_is_an_error(config):
    cfg = load(config, ["DROPIT.BUDGET_MB", "1"])
    with pytest.raises(ValueError, match=r"DROPIT.BUDGET_MB needs a sample"):
        build_module(cfg, convert=True)


def test_nothing_but_the_argument_converts(config):
    cfg = load(config)
    plain, converted = (build_module(cfg, convert=convert).model for convert in (False, True))
    assert dropit.coverage(plain).converted == 0
    assert dropit.coverage(converted).converted == 28
