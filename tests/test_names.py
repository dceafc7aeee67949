"""Names say what a thing is: four words that fit everything, and so say nothing, are no names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLIND = {"one", "found", "made", "given"}
# Where the syntax tree keeps identifiers: of names, arguments and keywords, attributes, functions
# and classes, imports, exceptions and patterns.
FIELDS = ("id", "arg", "attr", "name", "asname", "rest")


def blind_names(source: str | bytes) -> Iterator[tuple[int, str]]:
    """The line and the name of each identifier that says nothing, within f-strings too."""
    for node in ast.walk(ast.parse(source)):
        for field in FIELDS:
            name = getattr(node, field, None)
            if isinstance(name, str) and name in BLIND:
                yield getattr(node, "lineno", 0), name  # imports have no line before 3.10


@pytest.mark.parametrize(
    "source",
    [
        "one = 1",
        "for found in (): pass",
        "lambda made: 0",
        "f(given=1)",
        "x.found",
        "def one(): pass",
        "class made: pass",
        "import x as given",
        "from x import one",
        "try: pass\nexcept E as found: pass",
        "f'{made.name}'",
        "f'{x:{given}}'",
        "[x for one in y]",
    ],
)
def test_blind_names_are_seen_wherever_an_identifier_stands(source):
    assert len(set(blind_names(source))) == 1


@pytest.mark.parametrize("source", ["'one'", "# found", '"""As given."""', "one_token = x['made']"])
def test_prose_and_longer_names_are_left_alone(source):
    assert not set(blind_names(source))


@pytest.mark.parametrize("folder", ["pipeline", "schedules", "tests"])
def test_no_identifier_is_blind(folder):
    blind = [
        f"{file.relative_to(ROOT)}:{line}: call `{name}` by what it is: a node, a path, a record …"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, name in sorted(set(blind_names(file.read_bytes())))
    ]
    assert not blind, "\n".join(blind)
