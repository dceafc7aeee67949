"""Holds what commands share: what each gives back, and the arguments that several of them take."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from bertile.base.tables import lines
from bertile.cli.config_flags import EXPORT_FLAGS

if TYPE_CHECKING:
    from bertile.config import Config
    from bertile.targets.rows import Target


class Outcome(NamedTuple):
    """What a command prints: `data` with --json, else `text`."""

    data: Any
    text: str
    exit_code: int = 0


class Stream(NamedTuple):
    """What a command prints line by line, each as soon as it is there."""

    lines: Iterator[str]
    exit_code: int = 0


def add_model(parser: ArgumentParser, nargs: str | None = None) -> None:
    """MODEL, the one to compile."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=nargs,
        help="a Hugging Face directory or hub name, an .onnx file, a directory that `bertile"
        " export` has written, minilm, or synthetic:NAME",
    )


def add_bundle(parser: ArgumentParser) -> None:
    """BUNDLE, the directory to look at or to run."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a directory that `bertile compile` has written"
    )


def dry_run(options: Namespace, config: Config, row: Target | None = None) -> Outcome:
    """What --dry-run prints: the command's arguments, the row of its target, and what its flags
    may choose.
    """
    from bertile.export import asked

    plan = {"command": options.command, "model": options.model}
    if asked.is_fetched(options.model):
        plan["to fetch"] = "from the Hugging Face hub, which is not asked before the compile"
    plan["output"] = getattr(options, "output", None)
    choices = config.to_dict()
    if row is None:  # an export is for no machine
        choices = {name.replace("-", "_"): choices[name.replace("-", "_")] for name in EXPORT_FLAGS}
    else:
        plan |= {
            "target": row.name,
            "features": " ".join(row.features),
            "threads": row.threads,
        }
    rest = {name: value for name, value in choices.items() if name not in plan}
    return Outcome({**plan, "config": choices}, lines({**plan, **rest}))
