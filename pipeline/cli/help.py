"""Runs `bertile help`: explains the program, or one of its commands."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from bertile.base.errors import UsageError, nearest
from bertile.base.progress import Progress
from bertile.cli.command import Outcome


def add_arguments(parser: ArgumentParser) -> None:
    """The command to explain."""
    parser.add_argument("topic", metavar="COMMAND", nargs="?", help="a command (default: all)")


def run(options: Namespace, progress: Progress) -> Outcome:
    """What `bertile COMMAND --help` prints."""
    from bertile.cli import main

    name = options.topic
    if name is not None and name not in main.COMMANDS:
        raise UsageError(f"command '{name}' is unknown{nearest(name, main.COMMANDS)}")
    top, parsers = main._parser(*([name] if name else []))
    text = (parsers[name] if name else top).format_help().rstrip()
    return Outcome(text, text)
