"""Holds what commands share: what each gives back, and the arguments that several of them take."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any, NamedTuple

from bertile.base.tables import lines

if TYPE_CHECKING:
    from bertile.config import Config


class Outcome(NamedTuple):
    """What a command prints: `data` with --json, else `text`."""

    data: Any
    text: str
    exit_code: int = 0


def add_model(parser: ArgumentParser, nargs: str | None = None) -> None:
    """MODEL, the one to compile."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=nargs,
        help="a Hugging Face directory or hub name, an .onnx file, minilm, or synthetic:NAME",
    )


def add_bundle(parser: ArgumentParser) -> None:
    """BUNDLE, the directory to look at or to run."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a directory that `bertile compile` has written"
    )


def dry_run(options: Namespace, config: Config) -> Outcome:
    """What --dry-run prints: the command's arguments, the row of its target and every choice."""
    from bertile.targets.rows import resolve

    row = resolve(config.target, config.threads)
    plan = {
        "command": options.command,
        "model": options.model,
        "output": getattr(options, "output", None),
        "target": row.name,
        "features": " ".join(row.features),
        "threads": row.threads,
    }
    rest = {name: value for name, value in config.to_dict().items() if name not in plan}
    return Outcome({**plan, "config": config.to_dict()}, lines({**plan, **rest}))
