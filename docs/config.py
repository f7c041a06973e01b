"""Every config key in a table, from the code: python docs/config.py > docs/config.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from dropit.training.config import load as config
from dropit.training.config.load import CHECKS, CHOICES, defaults, flatten

HEAD = """\
# The config keys

What a file of `configs/` and the command line of `train.py` can set: `SOLVER: {LR: 0.01}` in a file, `SOLVER.LR 0.01`
or `SOLVER.LR=0.01` on the command line. A file names only what differs from the defaults, and may begin with
`_BASE_: other.yaml`. Written by `python docs/config.py > docs/config.md` from `dropit/training/config/load.py`.
"""
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}
_LONGEST = 12  # of the lists of choices that are written out


def comments(path: Path = Path(config.__file__)) -> dict[str, str]:
    """The comment above the default of each key, and of each section, in one line."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    return {key: _above(lines, line) for key, line in _assignments(ast.parse(text))}


def _assignments(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """("SOLVER.LR", its line), counted from 0, of each ``cfg.SOLVER.LR = ...``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            root, _, key = ast.unparse(node.targets[0]).partition(".")
            if root == "cfg":
                yield key, node.lineno - 1


def _above(lines: list[str], line: int) -> str:
    first = line
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(text.strip().removeprefix("#").strip() for text in lines[first:line])


def type_of(key: str, default: Any) -> str:
    """In words."""
    if not isinstance(default, list):
        return _TYPES[type(default)]
    element = type(default[0]) if default else config.ELEMENT_TYPES[key]
    return "list" if element is str else f"list of {_TYPES[element]}s"


def allowed(key: str) -> str:
    """The choices, or the range."""
    if key not in CHOICES:
        return CHECKS[key][0] if key in CHECKS else ""
    choices = CHOICES[key]
    return ", ".join(map(_code, choices)) if len(choices) <= _LONGEST else "a known name"


def _code(value: Any) -> str:
    """As it is typed."""
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else '`""`'


def _text(comment: str) -> str:
    """As Markdown, in a table."""
    for special in "<*|":
        comment = comment.replace(special, f"\\{special}")
    return comment


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(cfg: CfgNode, explained: dict[str, str]) -> Iterator[str]:
    """The lines of the page: a section of it for each of the config's, in their order."""
    yield HEAD
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, default in flatten(cfg).items():
        sections.setdefault(key.rpartition(".")[0], []).append((key, default))
    for name, items in sections.items():
        yield f"## {name or 'The run'}\n"
        if explained.get(name):
            yield f"{_text(explained[name])}\n"
        yield _row("key", "type", "default", "allowed", "what it is")
        yield _row(*["---"] * 5)
        for key, default in items:
            about = _text(explained.get(key, ""))
            yield _row(f"`{key}`", type_of(key, default), _code(default), allowed(key), about)
        yield ""


def page() -> str:
    """docs/config.md."""
    return "\n".join(table(defaults(), comments()))


if __name__ == "__main__":
    print(page(), end="")
