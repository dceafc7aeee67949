"""Finds English texts of mixed length on every machine with Python: docstrings of its standard
library, each cut behind the paragraph where it gets long.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from bertile.base.errors import BertileError
from bertile.evaluation.sentences import SEED, collected, docstrings

WORDS = range(3, 201)
PER_FILE = 10  # of each module at most, so that many subjects are spoken of


def paragraphs(count: int) -> list[str]:
    """Different texts of 3 to 200 words in a random order, always the same for one Python.

    Raises BertileError where the library has too few, as when it is installed without source.
    """
    chance = random.Random(SEED)
    library, chosen = collected(count, PER_FILE, _paragraphs, chance)
    if len(chosen) >= count:
        return chance.sample(chosen, count)
    raise BertileError(
        f"the standard library in {library} has {len(chosen)} docstrings for this, {count} are"
        " wanted",
        "ask for fewer texts",
    )


def _paragraphs(path: Path) -> Iterator[str]:
    """What is taken of the docstrings of a file."""
    return filter(None, map(first_paragraphs, docstrings(path)))


def first_paragraphs(docstring: str) -> str | None:
    """As many whole paragraphs as have 200 words together, line ends as blanks; None for less than
    three words.
    """
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if len(words) + len(paragraph.split()) >= WORDS.stop:
            break
        words += paragraph.split()
    return " ".join(words) if len(words) in WORDS else None
