"""Puts a table into a page, in place of the one before.

A place is ``FILE#NAME``, between <!-- NAME --> and <!-- /NAME --> of a page, or ``FILE`` alone, at
the name that a command has for it.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from bertile.base.errors import UsageError


def write_table(place: str, name: str, content: str, command: str) -> None:
    """As ``write``, with the command that has made the table."""
    write(place, name, f"{content}\n\nMade by `{command}`.")


def write(place: str, name: str, content: str) -> None:
    """Put a text into a page; UsageError where it cannot be read, or lacks the markers once."""
    path, before, after = _around(place, name)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(f"{before}\n{content}\n{after}", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def look_at(place: str, name: str = "") -> str:
    """The place, of a page that ``write`` can write: to be asked before anything is measured, which
    would be in vain. Without a name, which comes later, the page has to be there.
    """
    if name or split(place)[1]:
        _around(place, name)
    else:
        _text(split(place)[0])
    return place


def split(place: str) -> tuple[Path, str]:
    """The page, and the name, "" where the place has none."""
    file, _, name = place.partition("#")
    return Path(file), name


def argument(name: str) -> Callable[[str], str]:
    """``look_at`` for argparse."""

    def place(text: str) -> str:
        try:
            return look_at(text, name)
        except UsageError as error:
            raise ArgumentTypeError(str(error)) from None

    return place


def _around(place: str, name: str) -> tuple[Path, str, str]:
    """The page, and what it has up to the first marker and from the second one on."""
    path, own = split(place)
    name = own or name
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = (text := _text(path)).partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed) or text.count(start) > 1 or text.count(end) > 1:
        raise UsageError(
            f"{path} has no place for the table", f"write {start} and {end} into it once, in order"
        )
    return path, before + opened, closed + after


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the page '{path}' cannot be read: {error}", "give a text file that is there"
        ) from error
