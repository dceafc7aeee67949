"""Rows of values come in; a table for a terminal, or for Markdown, goes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """Align columns: numbers to the right, everything else to the left; None is a dash."""
    cells = [[_text(value) for value in row] for row in rows]
    least = 3 if markdown else 1  # Markdown wants dashes in every rule
    widths = [max(least, *map(len, column)) for column in zip(header, *cells)]
    right = [_is_number(column) for column in zip(*rows)] or [False] * len(widths)

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right)
        ]
        return f"| {' | '.join(parts)} |" if markdown else "  ".join(parts).rstrip()

    rules = ["-" * (width - 1) + (":" if numeric else "-") for width, numeric in zip(widths, right)]
    rule = line(rules if markdown else ["-" * width for width in widths])
    return "\n".join([line(header), rule, *map(line, cells)])


class Column(NamedTuple):
    """A column of rows that come one after another: its heading and the width of its cells."""

    heading: str
    width: int
    right: bool = False


def running(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """The lines of a table, each as soon as its row is there, its heading with the first.

    Cells are cut to 60 characters.
    """
    widths = [max(column.width, len(column.heading)) for column in columns]

    def line(cells: Iterable[str]) -> str:
        parts = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for column, cell, width in zip(columns, cells, widths)
        ]
        return "  ".join(parts).rstrip()

    for number, row in enumerate(rows):
        if not number:
            yield line(column.heading for column in columns)
            yield line("-" * width for width in widths)
        yield line(short(_text(value)) for value in row)


def short(text: str, width: int = 60) -> str:
    """A text as a single line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def size(count: int) -> str:
    """Bytes as a person reads them: 6.1 MB (10^6)."""
    number = float(count)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 and value else f"{value:.2f}"
    return str(value)


def _is_number(column: Sequence[Any]) -> bool:
    known = [value for value in column if value is not None]
    return bool(known) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in known
    )


def as_json(data: Any) -> str:
    """JSON of a result; paths and numpy values become plain ones."""
    return json.dumps(data, indent=2, default=_plain, ensure_ascii=False)


def lines(values: dict[str, Any]) -> str:
    """One line per value that is there, names in a column."""
    shown = {name: value for name, value in values.items() if value not in (None, (), [])}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
