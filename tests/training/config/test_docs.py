"""docs/config.md says of every key what dropit/training/config/load.py says."""

import importlib.util
from pathlib import Path

import pytest

from dropit.training.config.load import CHECKS, CHOICES, defaults, flatten

DOCS = Path(__file__).parents[3] / "docs"
KEYS = flatten(defaults())


@pytest.fixture(scope="module")
def config_docs():
    spec = importlib.util.spec_from_file_location("config_docs", DOCS / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_in_step_with_the_code(config_docs):
    written = (DOCS / "config.md").read_text()
    assert written == config_docs.page(), "run: python docs/config.py > docs/config.md"


def test_every_key_is_in_the_page_once(config_docs):
    rows = [line.split("`")[1] for line in config_docs.page().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_comment_above_its_default(config_docs, key):
    assert len(config_docs.comments().get(key, "").split()) > 1, f"{key}: say above its default what it is"


@pytest.mark.parametrize("key", sorted(CHECKS.keys() | CHOICES.keys()))
def test_every_default_passes_its_check(key):
    if key in CHOICES:
        assert KEYS[key] in CHOICES[key]
    if key in CHECKS:
        assert CHECKS[key][1](KEYS[key])


def test_comments_of_several_lines_and_sections_are_read_whole(config_docs, tmp_path):
    source = tmp_path / "config.py"
    source.write_text(
        "def defaults():\n"
        "    # Of the oven\n"
        "    cfg.OVEN = CfgNode()\n"
        "    # Degrees Celsius,\n"
        "    # not Fahrenheit\n"
        "    cfg.OVEN.HEAT = 180.0\n"
        "    cfg.OVEN.DOOR = 'shut'\n"
        "    other.KEY = 1\n"
    )
    read = config_docs.comments(source)
    assert read == {"OVEN": "Of the oven", "OVEN.HEAT": "Degrees Celsius, not Fahrenheit", "OVEN.DOOR": ""}


def test_a_row_shows_type_default_and_what_is_allowed(config_docs):
    rows = {line.split("`")[1]: line for line in config_docs.page().splitlines() if line.startswith("| `")}
    assert rows["DROPIT.GAMMA"].startswith("| `DROPIT.GAMMA` | number | `0.9` | in [0, 1) | Fraction of ")
    assert "| `none`, `pad`, `random_resized`" in rows["TRAIN.CROP"]
    assert rows["SOLVER.MILESTONES"].startswith("| `SOLVER.MILESTONES` | list of integers | `[]` | increasing epochs |")
    assert "\\<class>" in rows["TRAIN.PATH"]  # or a browser would take it for a tag
