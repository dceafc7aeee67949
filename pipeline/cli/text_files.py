"""Reads texts and pairs of texts from arguments and from files: lines, JSON lines, CSV."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

from bertile.base.errors import UsageError, nearest

Item = str | tuple[str, str]  # a text, or a pair of them

REMEDY = "give texts as arguments, with --input FILE, or as lines on stdin"
STDIN = "-"
# The names that a text, and the second of a pair, have in JSON and in the first line of a table.
USUAL = (("text", "text_pair"), ("question", "context"))
SINGLE = ("text", "context")
JSON = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Layout(NamedTuple):
    """What a file holds: pairs or texts, and the names of its fields (JSON) or columns (CSV)."""

    pair: bool = False
    fields: Sequence[str] = ()
    columns: Sequence[str] = ()


LINES = Layout()


def of_arguments(words: Sequence[str], pair: bool = False) -> list[Item]:
    """The texts that a command was given, two by two where they are pairs.

    Raises UsageError for a text that is not in UTF-8, and for one that has no second.
    """
    texts = [_decoded(number, word) for number, word in enumerate(words, 1)]
    if not pair:
        return texts
    if len(texts) % 2:
        raise UsageError(f"--pair has {len(texts)} texts, which are no pairs", "give two of each")
    return list(zip(texts[::2], texts[1::2]))


def of_file(path: str, layout: Layout = LINES) -> Iterator[Item]:
    """The texts of a file in UTF-8, or of stdin ("-"), read as they are asked for.

    What the file is follows from the layout, else from its ending: JSON lines, CSV, or a text of
    each line. Raises UsageError at once where it cannot be read or has no text, and later for what
    a line lacks, with its number.
    """
    if len(layout.fields) > 2 or len(layout.columns) > 2:
        raise UsageError("more than two names are no pair", "give the flag once, or twice")
    if layout.fields and layout.columns:
        raise UsageError("--field is for JSON lines, --column for CSV", "leave one of them out")
    where = "stdin" if path == STDIN else f"'{path}'"
    stream = _stdin() if path == STDIN else _opened(path)
    items = _items(stream, where, os.path.splitext(path)[1].lower(), layout)
    for first in items:
        return chain([first], items)
    raise UsageError(f"there is no text in {where}", REMEDY)


def _items(stream: BinaryIO | TextIO, where: str, ending: str, layout: Layout) -> Iterator[Item]:
    if layout.fields or (ending in JSON and not layout.columns):
        return _of_json_lines(_lines(stream, where), where, layout)
    if layout.columns or ending in DELIMITERS:
        return _of_table(stream, where, layout, DELIMITERS.get(ending, ","))
    lines = _lines(stream, where)
    return (
        (_halves(number, line, where) for number, line in lines)
        if layout.pair
        else (line for _, line in lines)
    )


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}") from error


def _stdin() -> BinaryIO | TextIO:
    if sys.stdin is None:
        raise UsageError("there is no text", REMEDY)
    return getattr(sys.stdin, "buffer", sys.stdin)


def _text_of(stream: BinaryIO | TextIO, newline: str | None) -> TextIO:
    """The characters of a stream; bytes that are not UTF-8 stay to be seen by `_valid`."""
    if isinstance(stream, io.TextIOBase):
        return stream
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(stream: BinaryIO | TextIO, where: str) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; a line ends as in any text file, and nowhere else."""
    for number, line in enumerate(_text_of(stream, None), 1):
        yield number, _valid(line[:-1] if line.endswith("\n") else line, number, where)


def _halves(number: int, line: str, where: str) -> Item:
    texts = line.split("\t")
    if len(texts) != 2:
        what = "no tab between two texts" if len(texts) == 1 else f"{len(texts)} texts, not two"
        raise UsageError(f"line {number} of {where} has {what}")
    return texts[0], texts[1]


def _of_json_lines(lines: Iterable[tuple[int, str]], where: str, layout: Layout) -> Iterator[Item]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"line {number} of {where} is not JSON", 'give a text or {"text": …} on each line'
            ) from error
        yield _of_json(value, number, where, layout)


def _of_json(value: Any, number: int, where: str, layout: Layout) -> Item:
    if isinstance(value, str) and not layout.fields:
        texts: Sequence[Any] = (value,)
    elif isinstance(value, list) and len(value) == 2 and not layout.fields:
        texts = value
    elif isinstance(value, dict):
        value = {name: text for name, text in value.items() if text is not None}
        texts = [value[name] for name in _names(value, layout.fields, layout.pair, number, where)]
    else:
        _lacks(number, where, f"no field '{(layout.fields or SINGLE)[0]}'")
    if layout.pair and len(texts) < 2:
        _lacks(number, where, "no second text")
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"line {number} of {where} has {_kind(text)} where a text should be")
        _valid(text, number, where)
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _of_table(
    stream: BinaryIO | TextIO, where: str, layout: Layout, delimiter: str
) -> Iterator[Item]:
    """The texts of a table: of the columns that its first line names, or of those of the numbers
    that the layout says, where the first line is a text too.
    """
    csv.field_size_limit(sys.maxsize)  # a text may have any length
    rows = csv.reader(_text_of(stream, ""), delimiter=delimiter, strict=True)
    numbered = layout.columns and all(name.isdecimal() for name in layout.columns)
    places: list[int] | None = None
    if numbered:
        places = [int(name) - 1 for name in layout.columns]
        if min(places) < 0:
            raise UsageError("--column is 0", "columns count from 1")
        if layout.pair and len(places) < 2:
            raise UsageError("a pair is in two columns", "give --column twice")
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UsageError(f"line {rows.line_num} of {where}: {error}") from error
        if row is None:
            return
        row = row or [""]  # a blank line is a text
        if places is None:
            row = [_valid(name, rows.line_num, where) for name in row]
            names = _names(row, layout.columns, layout.pair, rows.line_num, where)
            places = [row.index(name) for name in names]
            continue
        if max(places) >= len(row):
            _lacks(rows.line_num, where, f"no column {max(places) + 1}")
        texts = [_valid(row[place], rows.line_num, where) for place in places]
        yield texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _names(
    known: Collection[str], asked: Sequence[str], pair: bool, number: int, where: str
) -> Sequence[str]:
    """The one or two names of a text or of a pair: those that are asked for, or the usual ones."""
    if asked:
        for name in asked:
            if name not in known:
                _lacks(number, where, f"no '{name}'{nearest(name, known)}")
        if pair and len(asked) < 2:
            _lacks(number, where, "no second text: a pair has two names")
        return asked
    for names in USUAL:
        if all(name in known for name in names):
            return names
    single = next((name for name in SINGLE if name in known), None)
    if single is None or pair:
        wanted = "' and '".join(USUAL[0]) if pair else SINGLE[0]
        raise UsageError(
            f"line {number} of {where} has no '{wanted}'",
            f"name it with --field or --column; known: {', '.join(known)}",
        )
    return [single]


def _lacks(number: int, where: str, what: str) -> NoReturn:
    raise UsageError(f"line {number} of {where} has {what}")


def _valid(text: str, number: int, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"line {number} of {where} is not in UTF-8", "convert it") from error
    return text


def _decoded(number: int, text: str) -> str:
    """The text of an argument, of which Python keeps the bytes that its locale cannot read."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise UsageError(f"text {number} is not in UTF-8", "convert it") from error
