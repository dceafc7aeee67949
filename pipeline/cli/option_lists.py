"""Reads whole numbers above 0, and the words or numbers of a flag that takes several."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence

from bertile.base.errors import UsageError

LENGTH = "tokens in a sequence (default: 128, or as many as the model takes)"


def positive(text: str) -> int:
    """The number that a flag was given; argparse tells of anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def words(values: Sequence[str]) -> list[str]:
    """What stands between blanks or commas."""
    return [word for value in values for word in value.replace(",", " ").split()]


def numbers(flag: str, values: Sequence[str]) -> list[int]:
    """The same as whole numbers; UsageError, naming the flag, where there is something else."""
    texts = words(values)
    for word in texts:
        if not word.isdecimal():
            raise UsageError(f"{flag} is '{word}'", "give whole numbers, like: 1 8 or 1,8")
    if not texts:
        raise UsageError(f"{flag} has no number", "give whole numbers, like: 1 8 or 1,8")
    return list(map(int, texts))
