"""Reads a command's words: its flags wherever they stand, what is behind -- as it is."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bertile.base.errors import UsageError, nearest

MANY = ("*", "+")  # the `nargs` of what takes all words that are left


class Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are UsageErrors, and whose usage is one line."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(allow_abbrev=False, **choices)
        self.places: list[argparse.Action] = []  # what takes words that are no flags, in order

    def add_argument(self, *names: str, **choices: Any) -> argparse.Action:
        action = super().add_argument(*names, **choices)
        if not action.option_strings:
            self.places.append(action)
        return action

    def shorten_usage(self) -> None:
        """Leave the flags that may be left out to the list below the usage."""
        words = [self.prog, *(_shown(place) for place in self.places)]
        needed = [action for action in self._actions if action.option_strings and action.required]
        words += [f"{action.option_strings[0]} {action.metavar}" for action in needed]
        self.usage = " ".join([*words, "[FLAG ...]"]).replace("%", "%%")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see: {self.prog} --help")


class _Flags(Parser):
    """The flags of a command alone; `words` are its places, by another parser that help shows."""

    def __init__(self, whole: Parser) -> None:
        self.whole = whole
        super().__init__(prog=whole.prog)

    def add_argument(self, *names: str, **choices: Any) -> Any:
        return super().add_argument(*names, **choices) if names[0].startswith("-") else None

    def format_help(self) -> str:
        return self.whole.format_help()


def parse(
    whole: Parser,
    add: Callable[[Parser], None],
    words: Sequence[str],
    options: argparse.Namespace | None = None,
) -> argparse.Namespace:
    """What `words` say to the parser that `add` has filled; UsageError for what it does not take.

    argparse wants words that belong together to stand together, and its releases differ in what
    they make of a second --: so it reads the flags, and the rest is shared out here.
    """
    flags = _Flags(whole)
    add(flags)
    words, literal = list(words), []
    if "--" in words:
        words, literal = words[: words.index("--")], words[words.index("--") + 1 :]
    options, rest = flags.parse_known_args(words, options)
    unknown = [word for word in rest if word.startswith("-") and not _is_value(word)]
    if unknown:
        _refuse(unknown[0], whole)
    for name, value in _shared_out(whole, [*rest, *literal]).items():
        setattr(options, name, value)
    return options


def _shared_out(parser: Parser, words: list[str]) -> dict[str, Any]:
    """The words that each place of a command gets, in their order."""
    values, missing = {}, []
    for place in parser.places:
        many = place.nargs in MANY
        taken, words = (words, []) if many else (words[:1], words[1:])
        if not taken and place.nargs in (None, "+"):
            missing.append(str(place.metavar))
        for word in taken if place.choices else ():
            if word not in place.choices:
                known = nearest(word, place.choices)
                raise UsageError(f"{place.dest} '{word}' of {parser.prog} is unknown{known}")
        values[place.dest] = taken if many else taken[0] if taken else place.default
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if words:
        parser.error(f"unexpected argument '{words[0]}'")
    return values


def _is_value(word: str) -> bool:
    """Whether argparse takes a word with a dash in front for a value: a number, or a sentence."""
    return word == "-" or " " in word or re.fullmatch(r"-\d+|-\d*\.\d+", word) is not None


def _refuse(flag: str, parser: Parser) -> NoReturn:
    name = flag.partition("=")[0]
    close = difflib.get_close_matches(name, list(parser._option_string_actions), n=1)
    question = f"did you mean '{close[0]}'?" if close else f"see: {parser.prog} --help"
    raise UsageError(f"option '{name}' is unknown", question)


def _shown(place: argparse.Action) -> str:
    """A place as a usage line shows it: [TEXT ...] may be left out."""
    name = f"{place.metavar} ..." if place.nargs in MANY else str(place.metavar)
    return f"[{name}]" if place.nargs in ("?", "*") else name
