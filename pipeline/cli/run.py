"""Runs `bertile run`: texts in; vectors with their similarities, or labels with scores, out."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.cli.command import Outcome, add_bundle
from bertile.cli.option_lists import positive

_REMEDY = "give texts as arguments, with --file FILE, or as lines on stdin"


def add_arguments(parser: ArgumentParser) -> None:
    """A bundle and the texts that it is given."""
    add_bundle(parser)
    add = parser.add_argument
    add(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="a text; behind -- it may begin with a dash; none: each line of stdin is a text",
    )
    add("--file", metavar="FILE", help="a file in UTF-8, of which each line is a text; -: stdin")
    add(
        "--truncate",
        action="store_true",
        help="cut texts that are too long, instead of refusing them",
    )
    add("--threads", metavar="N", type=positive, help="threads to use")


def run(options: Namespace, progress: Progress) -> Outcome:
    """What the model says of the arguments, of the lines of a file, or of those of stdin."""
    texts = _texts(options.texts, options.file)
    from bertile.run import texts as runner

    result = runner.run(
        Path(options.bundle), texts, truncate=options.truncate, threads=options.threads
    )
    return Outcome(result, runner.as_text(result))


def _texts(arguments: list[str], file: str | None) -> list[str]:
    if arguments and file is not None:
        raise UsageError("texts and --file exclude each other", "leave one of them out")
    if file not in (None, "-"):
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise UsageError(f"'{file}' cannot be read: {error.strerror}") from error
        return _lines(content, f"'{file}'")
    if not arguments:
        if sys.stdin is None or (file is None and sys.stdin.isatty()):
            raise UsageError("there is no text", _REMEDY)
        return _lines(getattr(sys.stdin, "buffer", sys.stdin).read(), "stdin")
    for number, text in enumerate(arguments, 1):
        if not text.strip():
            raise UsageError(f"text {number} is empty", "give a text")
    return [_decoded(number, text) for number, text in enumerate(arguments, 1)]


def _decoded(number: int, text: str) -> str:
    """The text of an argument, of which Python keeps the bytes that its locale cannot read."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise UsageError(f"text {number} is not in UTF-8", "convert it") from error


def _lines(content: bytes | str, where: str) -> list[str]:
    """The lines that are not blank; a line ends as in any text file, and nowhere else."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"line {line} of {where} is not in UTF-8", "convert it") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UsageError(f"there is no text in {where}", _REMEDY)
    return texts
