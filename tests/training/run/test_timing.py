from pathlib import Path

import pytest

import train


@pytest.mark.parametrize("dropping", [True, False])
def test_time_says_where_a_step_goes(config, capsys, dropping):
    arguments = ["--mode", "time", "TRY_STEPS", "2", "MODEL.DROPIT", str(dropping)]
    assert train.main(["--cfg", config, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vit_tiny on imagenet: means of 2 steps of 20 images, on cpu"
    assert lines[1].split() == ["ms", "plain", *(["DropIT"] if dropping else [])]
    rows = {line[:18].strip(): [float(cell.rstrip("%")) for cell in line[18:].split()] for line in lines[2:-1]}
    parts = ["waiting for data", "to the device", "forward", "backward", "optimizer"]
    assert list(rows) == [*parts, "a step", "samples/s", "share of data"]
    for column, total in enumerate(rows["a step"]):
        assert total == pytest.approx(sum(rows[part][column] for part in parts), abs=0.3)
        assert rows["samples/s"][column] == pytest.approx(20_000 / total, rel=0.02, abs=0.6)  # a whole number
    assert lines[-1].startswith("the loader alone gives")
    assert not Path("outputs").exists()
