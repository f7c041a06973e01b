"""Which modules and operators save how many bytes, and in which dtypes: the tables that CacheMeter prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class SavedStorage:
    """A storage that is saved for backward, and by which modules and operators, in the order in which they saved it."""

    storage: int
    nbytes: int
    dtype: str
    modules: tuple[str, ...]
    operators: tuple[str, ...]
    line: str = ""  # of code that saved it first

    @property
    def operator(self) -> str:
        """Return which operators save it: "Convolution + Relu" where both do."""
        return " + ".join(sorted(set(self.operators)))


@dataclass(frozen=True)
class Row:
    """A line of a table. ``plain`` is what the model saves that was measured for comparison."""

    name: str
    nbytes: int
    dtypes: str
    plain: int | None = None


def rows_by(
    key: Callable[[SavedStorage], str], saved: Iterable[SavedStorage], plain: Iterable[SavedStorage] | None = None
) -> list[Row]:
    """Return the sums by name, largest first."""
    sizes: dict[str, int] = defaultdict(int)
    dtypes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for entry in saved:
        sizes[key(entry)] += entry.nbytes
        dtypes[key(entry)][entry.dtype] += entry.nbytes
    before: dict[str, int] = defaultdict(int)
    for entry in plain or ():
        before[key(entry)] += entry.nbytes
    names = sorted(sizes.keys() | before.keys(), key=lambda name: (-sizes.get(name, 0), -before.get(name, 0), name))
    return [
        Row(
            name,
            sizes.get(name, 0),
            ", ".join(sorted(dtypes[name], key=lambda dtype: -dtypes[name][dtype])),
            None if plain is None else before.get(name, 0),
        )
        for name in names
    ]


def largest(rows: list[Row], count: int) -> list[Row]:
    """The first ``count`` rows, and one for all others."""
    if len(rows) <= count + 1:
        return rows
    others = rows[count:]
    return [*rows[:count], Row(f"{len(others)} others", sum(row.nbytes for row in others), "")]


def group(name: str, depth: int) -> str:
    """The first ``depth`` parts of a module's name."""
    return ".".join(name.split(".")[:depth]) or "(the model itself)"


def columns(title: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; the last line is the total."""
    compared = any(row.plain is not None for row in rows)
    total = sum(row.nbytes for row in rows)
    heads = [title, "saved, MiB", *(["plain, MiB"] if compared else []), "share", "stored as"]
    lines = [
        [
            row.name,
            f"{row.nbytes / MIB:.2f}",
            *([f"{(row.plain or 0) / MIB:.2f}"] if compared else []),
            f"{row.nbytes / total:.1%}" if total else "",
            row.dtypes,
        ]
        for row in rows
    ]
    plain = [f"{sum(row.plain or 0 for row in rows) / MIB:.2f}"] if compared else []
    return heads, [*lines, ["total", f"{total / MIB:.2f}", *plain, "", ""]]


def as_text(title: str, rows: list[Row]) -> str:
    """A table in plain text: names and forms to the left, numbers to the right."""
    heads, lines = columns(title, rows)
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    left = {0, len(heads) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in [heads, *lines])
    )


def print_rich(title: str, rows: list[Row]) -> None:
    """Print the same by rich."""
    from rich.console import Console
    from rich.table import Table

    heads, lines = columns(title, rows)
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i in {0, len(heads) - 1} else "right", overflow="fold")
    for line in lines[:-1]:
        table.add_row(*line)
    table.add_section()
    table.add_row(*lines[-1])
    Console().print(table)
