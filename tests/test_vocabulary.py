"""Words that CONTRIBUTING's glossary has replaced stay away: each concept has one word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
SOURCES = [*(ROOT / "dropit").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
# What was said before, and what is said now.
RETIRED = {
    r"[Pp]acker\b|for_layer": "SavePolicy, Saver",
    r"\b[Oo]ffer(s|ed|ing)?\b|on offer": "publish",
    r"\bheld for backward|\bholds? for backward|held_mib|bytes_held": "saved for backward, cache",
    r"\b(looks?|look) on\b": "whether torch.compile or torch.func is tracing",
    r"\blets? go of\b|\blet go of\b": "frees",
    r"\bwritten anew\b|\bcomputed anew\b|\bpacked anew\b": "again",
    r"no_view|where_saved|mark_inside|keep_marked|pack_small|_spoken_of|_take_stock": "see the names in dropit/",
    r"\b(is|are) not asked\b": "is ignored",
    r"\bno number\b": "not finite",
    r"\b_?spared\b": "without weight decay",
    r"\bPackedInputLayer|LosslessLayer|QuantizedLayer\b": "DropITLayer with declared attributes",
}


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_does_not_come_back(word):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*SOURCES, *PAGES)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(word, line)
    ]
    assert not found, f"say {RETIRED[word]}\n" + "\n".join(found)
