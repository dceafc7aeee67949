"""Flags stand anywhere, -- ends them, and every place of a command gets its words."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bertile.base.errors import UsageError
from bertile.cli import main
from bertile.cli.parser import Parser, parse


def add(parser: Parser) -> None:
    """A command with a place of each kind, and flags of each kind."""
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("action", metavar="a|b", nargs="?", choices=("a", "b"), default="b")
    parser.add_argument("texts", metavar="TEXT", nargs="*")
    group = parser.add_argument_group("group").add_mutually_exclusive_group().add_argument
    group("--flag", action="store_true")
    group("--count", type=int)
    parser.add_argument("--many", nargs="+")


def read(*words: str) -> Namespace:
    whole = Parser(prog="test")
    add(whole)
    return parse(whole, add, words)


@pytest.mark.parametrize(
    "words",
    [
        ("bundle", "a", "x", "y", "--count", "3"),
        ("--count", "3", "bundle", "a", "x", "y"),
        ("bundle", "--count", "3", "a", "x", "y"),
        ("bundle", "a", "x", "--count=3", "y"),
        ("--count", "3", "--", "bundle", "a", "x", "y"),
        ("bundle", "--count", "3", "--", "a", "x", "y"),
    ],
)
def test_flags_stand_anywhere(words: tuple[str, ...]) -> None:
    options = read(*words)
    assert (options.bundle, options.action, options.texts) == ("bundle", "a", ["x", "y"])
    assert (options.count, options.flag, options.many) == (3, False, None)


def test_what_is_behind_two_dashes_is_no_flag() -> None:
    options = read("bundle", "--many", "1", "2", "--", "a", "--flag", "--", "-x")
    assert (options.many, options.texts) == (["1", "2"], ["--flag", "--", "-x"])
    assert not options.flag


def test_numbers_and_sentences_with_a_dash_are_words() -> None:
    assert read("bundle", "a", "-5", "-0.5", "-5 degrees", "-").texts == [
        "-5",
        "-0.5",
        "-5 degrees",
        "-",
    ]


def test_places_that_may_be_empty_have_their_default() -> None:
    options = read("bundle")
    assert (options.action, options.texts) == ("b", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: BUNDLE; see: test --help"),
        (("bundle", "c"), "action 'c' of test is unknown; known: a, b"),
        (("bundle", "--cuont", "3"), "option '--cuont' is unknown; did you mean '--count'?"),
        (("bundle", "--cou", "3"), "option '--cou' is unknown"),
        (("bundle", "--count"), "argument --count: expected one argument"),
        (("bundle", "--count", "x"), "argument --count: invalid int value: 'x'"),
        (("bundle", "--flag", "--count", "3"), "not allowed with argument --flag"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert message in str(caught.value)


def test_usage_is_one_line_with_what_must_be_there() -> None:
    _, parsers = main._parser("compile", "run", "tune")
    assert parsers["compile"].usage == "bertile compile MODEL -o DIR [FLAG ...]"
    assert parsers["run"].usage == "bertile run BUNDLE [TEXT ...] [FLAG ...]"
    assert parsers["tune"].usage == "bertile tune [MODEL] [FLAG ...]"


def test_run_takes_everything_behind_two_dashes() -> None:
    options = main._parse(["run", "--", "bundle", "-x"])
    assert (options.bundle, options.texts) == ("bundle", ["-x"])
