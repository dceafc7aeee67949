"""Splits what a flag with several values was given into words or whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

from bertile.base.errors import UsageError


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
