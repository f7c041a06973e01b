"""docs/config.md says of every key what dropit/training/config/keys.py says."""

import importlib.util
from pathlib import Path

import pytest

from dropit.training.config.keys import KEYS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def config_docs():
    spec = importlib.util.spec_from_file_location("config_docs", DOCS / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page):
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


def test_the_page_is_in_step_with_the_code(config_docs):
    written = (DOCS / "config.md").read_text()
    assert written == config_docs.page(), "run: python docs/config.py > docs/config.md"


def test_every_key_is_in_the_page_and_every_section_once(config_docs):
    page = config_docs.page()
    assert list(rows(page)) == list(KEYS)
    sections = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(sections) == len(set(sections)) == 9


def test_a_row_shows_type_default_and_what_is_allowed(config_docs):
    shown = rows(config_docs.page())
    assert shown["DROPIT.GAMMA"].startswith("| `DROPIT.GAMMA` | number | `0.9` | in [0, 1) | Fraction of ")
    assert "| `none`, `pad`, `random_resized`" in shown["TRAIN.CROP"]
    milestones = "| `SOLVER.MILESTONES` | list of integers | `[]` | increasing epochs, from 1 on |"
    assert shown["SOLVER.MILESTONES"].startswith(milestones)
    assert "\\<class>" in shown["TRAIN.PATH"]  # or a browser would take it for a tag
