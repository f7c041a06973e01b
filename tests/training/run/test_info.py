import re
from pathlib import Path

import pytest

import train
from tests.training.outcome import events, failure, scalars


@pytest.mark.parametrize("compress", ["lossless", "int8"])
def test_info_tells_the_step_without_taking_it(config, capsys, compress):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.COMPRESS", compress]) == 0
    out = capsys.readouterr().out
    assert "vit_tiny on imagenet, 0.47 M parameters" in out
    assert "20 x 3 x 32 x 32" in out
    assert "converted 41 of 41" in out if compress == "int8" else "GELU x4: plain: compress=" in out
    told = float(re.search(r"^total +([\d.]+) +[\d.]+$", out, re.MULTILINE)[1])
    assert "predicted peak of a step, MiB" in out
    assert not Path("outputs").exists()
    # What it tells is what a run then measures.
    assert train.main(["--cfg", config, "SOLVER.MAX_EPOCHS", "1", "DROPIT.COMPRESS", compress]) == 0
    measured = scalars(events(Path("outputs/few/vit/version_0")), "dropit/cache_mb")[0]
    assert told == pytest.approx(measured, rel=0.02, abs=0.01)


def test_info_of_a_plain_config(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "MODEL.DROPIT", "false", "NUM_GPUS", "2"]) == 0
    out = capsys.readouterr().out
    assert "10 x 3 x 32 x 32" in out
    assert "layers" not in out.splitlines()[3]
    assert failure(capsys, "--cfg", config, "--mode", "info", "--resume") == (
        2,
        "train.py: --resume is for --mode train\n",
    )


def test_info_of_a_budget_predicts_with_it(config, capsys):
    assert train.main(["--cfg", config, "--mode", "info", "DROPIT.BUDGET_MB", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "2.5 MiB of cache, spent as measured when training starts" in out
    assert re.search(r"cache +2\.5\n", out)
