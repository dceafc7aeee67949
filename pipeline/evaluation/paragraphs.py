"""Finds English texts of mixed length on every machine with Python: docstrings of its standard
library, each cut behind the paragraph where it gets long.
"""

from __future__ import annotations

import random
import re

from bertile.base.errors import BertileError
from bertile.evaluation.sentences import SEED, docstrings, library_files

WORDS = range(3, 201)
PER_FILE = 10  # of each module at most, so that many subjects are spoken of


def paragraphs(count: int) -> list[str]:
    """Different texts of 3 to 200 words in a random order, always the same for one Python.

    Raises BertileError where the library has too few, as when it is installed without source.
    """
    chance = random.Random(SEED)
    library, files = library_files()
    chance.shuffle(files)
    chosen: dict[str, None] = {}
    for path in files:
        texts = dict.fromkeys(filter(None, map(first_paragraphs, docstrings(path))))
        new = [text for text in texts if text not in chosen]
        chosen.update(dict.fromkeys(chance.sample(new, min(PER_FILE, len(new)))))
        if len(chosen) >= count:
            return chance.sample(list(chosen), count)
    raise BertileError(
        f"the standard library in {library} has {len(chosen)} docstrings for this, {count} are"
        " wanted",
        "ask for fewer texts",
    )


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
