"""Finds English texts of mixed length on every machine with Python: docstrings of its standard
library, each cut behind the paragraph where it gets long.
"""

from __future__ import annotations

import random
import re

from bertile.base.errors import BertileError
from bertile.evaluation.sentences import SEED, docstrings, library_files

WORDS = range(3, 201)


def paragraphs(count: int) -> list[str]:
    """Different texts of 3 to 200 words in a random order, always the same for one Python.

    Raises BertileError where the library has too few, as when it is installed without source.
    """
    library, files = library_files()
    of_each = (first_paragraphs(text) for path in files for text in docstrings(path))
    texts = list(dict.fromkeys(filter(None, of_each)))
    if len(texts) < count:
        raise BertileError(
            f"the standard library in {library} has {len(texts)} docstrings, {count} are wanted",
            "ask for fewer texts",
        )
    return random.Random(SEED).sample(texts, count)


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
