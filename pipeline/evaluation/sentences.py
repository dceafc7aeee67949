"""Finds varied English sentences on every machine with Python: first sentences of the docstrings of
its standard library.

    python -m bertile.evaluation.sentences -o FILE
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bertile.base.errors import BertileError

COUNT = 500
WORDS = range(5, 41)
PER_FILE = 5  # of each module a few, so that many subjects are spoken of
SEED = 20
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


def sentences(count: int = COUNT) -> list[str]:
    """Different sentences of 5 to 40 words, always the same for one version of Python.

    Raises BertileError where the library has too few, as when it is installed without source.
    """
    library, chosen = collected(count, PER_FILE, _sentences, random.Random(SEED))
    if len(chosen) >= count:
        return chosen[:count]
    raise BertileError(
        f"the standard library in {library} has {len(chosen)} sentences in docstrings, {count} are"
        " wanted",
        "give texts of your own",
    )


def collected(
    count: int,
    each: int,
    texts_of: Callable[[Path], Iterable[str]],
    chance: random.Random,
) -> tuple[Path, list[str]]:
    """Where the standard library lies, and different texts of its files, at most `each` of a file:
    `count` or some more, fewer where it has no more.
    """
    library, files = library_files()
    chance.shuffle(files)
    chosen: dict[str, None] = {}
    for path in files:
        new = [text for text in dict.fromkeys(texts_of(path)) if text not in chosen]
        chosen.update(dict.fromkeys(chance.sample(new, min(each, len(new)))))
        if len(chosen) >= count:
            break
    return library, list(chosen)


def library_files() -> tuple[Path, list[Path]]:
    """Where the standard library lies, and its files that people write for people."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.rglob("*.py"))
    ours = [path for path in files if not set(path.relative_to(library).parts) & set(LEFT_OUT)]
    return library, ours


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file, without their indentation."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # the library has templates and samples that are no programs
        return
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def _sentences(path: Path) -> Iterator[str]:
    """The first sentence of each docstring of a file."""
    return filter(None, map(first_sentence, docstrings(path)))


def first_sentence(text: str) -> str | None:
    """The first sentence of a docstring; None where it is no sentence of plain words."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    match = re.match(r"[A-Z].*?(?<!e\.g)(?<!i\.e)[.!?](?= |$)", paragraph)
    if match is None:
        return None
    words = match[0].split()
    plain = [word for word in words if re.fullmatch(r"[(\"']?[A-Za-z][a-z'-]*[\"').,;:!?]*", word)]
    good = len(words) in WORDS and len(plain) >= 0.8 * len(words)
    return match[0] if good else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sentences, one a line."""
    parser = argparse.ArgumentParser(prog="python -m bertile.evaluation.sentences")
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the directory to write"
    )
    parser.add_argument("--count", metavar="N", type=int, default=COUNT, help="how many (500)")
    options = parser.parse_args(arguments)
    text = "".join(f"{sentence}\n" for sentence in sentences(options.count))
    Path(options.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
