"""Texts of arguments, lines, JSON lines and CSV: every line is a text, what is wrong is named."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import pytest

from bertile.base.errors import UsageError
from bertile.cli import text_files
from bertile.cli.text_files import Layout

# As bytes, and the texts that its lines are.
LINES = {
    "blank lines": (b"one\n\n \t\ntwo\n", ["one", "", " \t", "two"]),
    "a blank line alone": (b"\n", [""]),
    "no last end": (b"one\ntwo", ["one", "two"]),
    "of Windows": (b"\xef\xbb\xbfone\r\n\r\ntwo\r\n", ["one", "", "two"]),
    "ends of old": (b"one\rtwo\r", ["one", "two"]),
    "a tab": (b"one\ttwo\n", ["one\ttwo"]),
    "other separators": (
        "a\u2028b\x85c\x0bd\x0ce\x1cf\n".encode(),
        ["a\u2028b\x85c\x0bd\x0ce\x1cf"],
    ),
    "blanks around": (b"  one \n", ["  one "]),
    "letters": (
        "gr\u00fcn \u4f60\u597d \U0001f600\n".encode(),
        ["gr\u00fcn \u4f60\u597d \U0001f600"],
    ),
}
# The name of a file, its bytes, its layout, and the texts that it holds.
FILES = {
    "pairs": ("x.txt", b"one\ttwo\n\t\n", Layout(pair=True), [("one", "two"), ("", "")]),
    "json": ("x.jsonl", b'{"text": "one", "n": 1}\n"two"\n""\n', Layout(), ["one", "two", ""]),
    "json of Windows": ("x.JSONL", b'\xef\xbb\xbf{"text": "a\\nb"}\r\n', Layout(), ["a\nb"]),
    "json, U+2028": ("x.jsonl", '"a\u2028b"\n'.encode(), Layout(), ["a\u2028b"]),
    "json pairs": (
        "x.ndjson",
        b'{"text": "a", "text_pair": "b"}\n["c", "d"]\n{"context": "f", "question": "e"}\n'
        b'{"text": "g", "text_pair": null}\n',
        Layout(),
        [("a", "b"), ("c", "d"), ("e", "f"), "g"],
    ),
    "json context": ("x.jsonl", b'{"context": "one"}\n', Layout(), ["one"]),
    "json field": ("x.jsonl", b'{"text": "a", "body": "b"}\n', Layout(fields=["body"]), ["b"]),
    "json fields": (
        "x.txt",
        b'{"q": "a", "d": "b"}\n',
        Layout(fields=["q", "d"]),
        [("a", "b")],
    ),
    "csv": ("x.csv", b'id,text\n1,one\n2,"two, ""2""\nlines"\n3,\n', Layout(), None),
    "csv of Windows": ("x.csv", b"\xef\xbb\xbftext\r\none\r\n\r\ntwo\r\n", Layout(), None),
    "csv pairs": ("x.csv", b"text_pair,text\nb,a\n", Layout(), [("a", "b")]),
    "csv column": ("x.csv", b"id,body\n1,one\n", Layout(columns=["body"]), ["one"]),
    "csv by number": ("x.csv", b"1,one\n2,two\n", Layout(columns=["2"]), ["one", "two"]),
    "csv columns": ("x.data", b"a,b\n", Layout(columns=["2", "1"]), [("b", "a")]),
    "tsv": ("x.tsv", b"label\ttext\n1\tone, two\n", Layout(), ["one, two"]),
}
TABLES = {"csv": ["one", 'two, "2"\nlines', ""], "csv of Windows": ["one", "", "two"]}
NO_TEXTS = {
    "empty": ("x.txt", b"", "there is no text in {}; give texts as arguments"),
    "a mark alone": ("x.txt", b"\xef\xbb\xbf", "there is no text in {}; give texts"),
    "a header alone": ("x.csv", b"text\n", "there is no text in {}; give texts"),
    "latin-1": ("x.txt", b"good\ngr\xfcn\n", "line 2 of {} is not in UTF-8; convert it"),
    "latin-1 in JSON": ("x.jsonl", b'"good"\n"gr\xfcn"', "line 2 of {} is not in UTF-8; convert"),
    "latin-1 in CSV": ("x.csv", b"text\ngr\xfcn\n", "line 2 of {} is not in UTF-8; convert it"),
    "UTF-16": ("x.txt", "good".encode("utf-16"), "line 1 of {} is not in UTF-8; convert it"),
    "half a letter": ("x.jsonl", b'"\\ud83d"\n', "line 1 of {} is not in UTF-8; convert it"),
    "no JSON": ("x.jsonl", b'"a"\n\n', "line 2 of {} is not JSON; give a text or"),
    "a list": ("x.jsonl", b"[1, 2, 3]\n", "line 1 of {} has no field 'text'"),
    "a number": ("x.jsonl", b'{"text": 3}\n', "line 1 of {} has a number where a text should"),
    "no field": (
        "x.jsonl",
        b'{"txt": "a"}\n',
        "line 1 of {} has no 'text'; name it with --field or --column; known: txt",
    ),
    "no column": ("x.csv", b"id,body\n1,a\n", "line 1 of {} has no 'text'; name it with --field"),
    "short row": ("x.csv", b"id,text\n1,a\n2\n", "line 3 of {} has no column 2"),
    "open quote": ("x.csv", b'text\n"a\n', "line 2 of {}: unexpected end of data"),
}


def read(path: Path, layout: Layout = text_files.LINES) -> list[text_files.Item]:
    return list(text_files.of_file(str(path), layout))


def typed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("case", LINES)
def test_every_line_of_a_file_or_of_stdin_is_a_text(tmp_path, monkeypatch, case) -> None:
    content, texts = LINES[case]
    (tmp_path / "texts").write_bytes(content)
    assert read(tmp_path / "texts") == texts
    typed(monkeypatch, content)
    assert read(Path("-")) == texts


@pytest.mark.parametrize("case", FILES)
def test_files_have_the_texts_of_their_kind(tmp_path, monkeypatch, case) -> None:
    name, content, layout, texts = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, layout) == (TABLES[case] if texts is None else texts)
    if layout.fields or layout.columns:  # which say what stdin is, too
        typed(monkeypatch, content)
        assert read(Path("-"), layout) == texts


@pytest.mark.parametrize("case", NO_TEXTS)
def test_what_a_file_lacks_is_named_with_its_line(tmp_path, case) -> None:
    name, content, sentence = NO_TEXTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(sentence.format(f"'{tmp_path / name}'"))


@pytest.mark.parametrize(
    ("name", "content", "layout", "message"),
    [
        ("x.txt", b"a\n", Layout(pair=True), "line 1 of {} has no tab between two texts"),
        ("x.txt", b"a\tb\tc\n", Layout(pair=True), "line 1 of {} has 3 texts, not two"),
        ("x.jsonl", b'"a"\n', Layout(pair=True), "line 1 of {} has no second text"),
        ("x.jsonl", b'{"text": "a"}', Layout(pair=True), "{} has no 'text' and 'text_pair'"),
        ("x.jsonl", b'{"a": "b"}', Layout(fields=["b"]), "has no 'b'; known: a"),
        ("x.csv", b"body,b\n", Layout(columns=["bodi"]), "no 'bodi'; did you mean 'body'?"),
        ("x.csv", b"a\n", Layout(columns=["2"]), "line 1 of {} has no column 2"),
        ("x.csv", b"a\n", Layout(columns=["0"]), "--column is 0; columns count from 1"),
        ("x.csv", b"a\n", Layout(True, columns=["1"]), "a pair is in two columns"),
        ("x.csv", b"a\n", Layout(columns=["a"] * 3), "more than two names are no pair"),
        ("x.csv", b"a\n", Layout(False, ["a"], ["a"]), "--field is for JSON lines"),
    ],
)
def test_layouts_that_a_file_does_not_have_are_refused(
    tmp_path, name, content, layout, message
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name, layout)
    assert message.format(f"'{tmp_path / name}'") in str(caught.value)


def test_a_file_is_read_as_its_texts_are_asked_for(monkeypatch) -> None:
    """A pipe that never ends gives its first texts; what is wrong behind them is not seen."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(_Endless())))
    texts = text_files.of_file("-")
    assert list(itertools.islice(texts, 3)) == ["a text", "a text", "a text"]


class _Endless(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        line = (b"a text\n" * (len(buffer) // 7 + 1))[: len(buffer) // 7 * 7]
        buffer[: len(line)] = line
        return len(line)


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=f"'{path}' cannot be read: {reason}"):
            text_files.of_file(str(path))


def test_arguments_are_texts_or_pairs() -> None:
    assert text_files.of_arguments(["one", "", " \t"]) == ["one", "", " \t"]
    assert text_files.of_arguments(["a", "b", "c", "d"], pair=True) == [("a", "b"), ("c", "d")]
    # what a locale that is not UTF-8 makes of bytes that are
    escaped = os.fsdecode("gr\u00fcn".encode())
    assert text_files.of_arguments([escaped, "gr\udcc3\udcbcn"]) == ["gr\u00fcn", "gr\u00fcn"]
    with pytest.raises(UsageError, match="text 2 is not in UTF-8; convert it"):
        text_files.of_arguments(["x", "a\udcff"])
    with pytest.raises(UsageError, match="--pair has 3 texts, which are no pairs"):
        text_files.of_arguments(["a", "b", "c"], pair=True)
