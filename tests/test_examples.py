"""Every example runs as typed: it learns, and holds less than the plain model."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_is_one_for_each_kind_of_loop():
    assert [path.stem for path in EXAMPLES] == ["huggingface_trainer", "lightning_callback", "plain_loop", "timm_model"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_learns_and_holds_less(path, tmp_path):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(path), "3"]
    done = processes.run(command, cwd=tmp_path, env=offline, check=True)
    cache, plain = map(
        float, re.search(r"^cache +([\d.]+) MiB saved for backward, ([\d.]+) plain$", done.stdout, re.M).groups()
    )
    assert 0 < cache < 0.75 * plain
    losses = [float(loss) for loss in re.findall(r"^loss +([\d.]+) in epoch", done.stdout, re.M)]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    accuracy = float(re.search(r"^accuracy +([\d.]+)$", done.stdout, re.M)[1])
    assert 0.3 < accuracy <= 1  # one in ten by chance
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_first_lines_say_how_to_run_it(path):
    assert f"\npython examples/{path.name} [epochs]\n" in path.read_text()
