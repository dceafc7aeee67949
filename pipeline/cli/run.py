"""Runs `bertile run`: texts in; vectors with their similarities, or labels with scores, out."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.cli.command import Outcome, add_bundle


def add_arguments(parser: ArgumentParser) -> None:
    """A bundle and the texts that it is given."""
    add_bundle(parser)
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="none: one text per line of stdin")
    add("--truncate", action="store_true", help="cut a text that is too long, instead of failing")
    add("--threads", metavar="N", type=int, help="cores to use")


def run(options: Namespace, progress: Progress) -> Outcome:
    """What the model says of the arguments, or of the lines of stdin."""
    from bertile.run import texts as runner

    texts = options.texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise UsageError("there is no text", "give texts as arguments or as lines on stdin")
    result = runner.run(
        Path(options.bundle), texts, truncate=options.truncate, threads=options.threads
    )
    return Outcome(result, runner.as_text(result))
