"""Every config key in a table, from the code: python docs/config.py > docs/config.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from dropit.training.config.keys import KEYS, Key

HEAD = """\
# The config keys

What a file of `configs/` and the command line of `train.py` can set: `SOLVER: {LR: 0.01}` in a file, `SOLVER.LR 0.01`
or `SOLVER.LR=0.01` on the command line. A file names only what differs from the defaults, and may begin with
`_BASE_: other.yaml`. A key that is set but has no effect under the other settings is named in a warning. Written by
`python docs/config.py > docs/config.md` from `dropit/training/config/keys.py`.
"""
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}


def type_of(key: Key) -> str:
    """Return the type of its value in words."""
    if not isinstance(key.default, list):
        return _TYPES[key.type]
    return "list" if key.type is str else f"list of {_TYPES[key.type]}s"


def allowed(key: Key) -> str:
    """Return the choices or the range."""
    return ", ".join(map(_code, key.allowed.choices)) or key.allowed.text


def _code(value: Any) -> str:
    """Return a value as it is typed."""
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else '`""`'


def _text(about: str) -> str:
    """Return a description as Markdown in a table."""
    for special in "<*|":
        about = about.replace(special, f"\\{special}")
    return about


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _section(key: Key) -> str:
    return key.name.rpartition(".")[0]


def table() -> Iterator[str]:
    """Yield the lines of the page: one section for the keys of the run, and one for each of the config's."""
    yield HEAD
    for section, keys in groupby(KEYS.values(), _section):
        yield f"## {section or 'The run'}\n"
        yield _row("key", "type", "default", "allowed", "what it is")
        yield _row(*["---"] * 5)
        for key in keys:
            yield _row(f"`{key.name}`", type_of(key), _code(key.default), allowed(key), _text(key.about))
        yield ""


def page() -> str:
    """Return docs/config.md."""
    return "\n".join(table())


if __name__ == "__main__":
    print(page(), end="")
