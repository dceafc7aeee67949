"""Tables: numbers to the right, text to the left, for terminals and for Markdown."""

from __future__ import annotations

import pytest

from bertile.base.tables import Column, running, short, size, table


def test_table_aligns_numbers_right_and_text_left() -> None:
    assert table(("name", "ms"), [("a", 1.0), ("longer", 12.345), ("none", None)]) == (
        "name       ms\n"
        "------  -----\n"
        "a        1.00\n"
        "longer  12.35\n"
        "none        -"
    )  # fmt: skip


def test_table_writes_markdown() -> None:
    text = table(("name", "n"), [("a", 3)], markdown=True)
    assert text == "| name |   n |\n| ---- | --: |\n| a    |   3 |"


def test_table_shows_small_numbers_with_their_exponent() -> None:
    assert table(("x",), [(1.25e-6,)]).splitlines()[-1] == "1.25e-06"


def test_table_without_rows_is_its_header() -> None:
    assert table(("a", "b"), []) == "a  b\n-  -"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (91_500_000, "91.5 MB"), (1_340_000_000, "1.3 GB")],
)
def test_size_is_readable(count: int, text: str) -> None:
    assert size(count) == text


def test_running_table_gives_each_line_as_its_row_comes() -> None:
    def rows():
        for text in ("a\nb", "c" * 99):
            read.append(text)
            yield (1.5, text)

    read: list[str] = []
    lines = running([Column("ms", 6, right=True), Column("text", 0)], rows())
    assert read == []  # an error of the first row comes before the heading
    assert [next(lines), next(lines), next(lines)] == [
        "    ms  text",
        "------  ----",
        "  1.50  a b",
    ]
    assert len(read) == 1
    assert list(lines) == [f"  1.50  {'c' * 57}..."]
    assert list(running([Column("x", 1)], [])) == []


def test_short_text_is_a_single_line() -> None:
    assert short(" a \n b\t") == "a b" and short("abcdef", 5) == "ab..."
