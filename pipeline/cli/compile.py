"""Runs `bertile compile`: every stage, from a model to a checked bundle."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from bertile.base.progress import Progress
from bertile.base.tables import lines, size
from bertile.cli.command import Outcome, add_model, dry_run
from bertile.cli.config_flags import add_config, read_config


def add_arguments(parser: ArgumentParser) -> None:
    """A model, a directory, and every choice of a compile."""
    add_model(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="the directory to write"
    )
    add_config(parser)


def run(options: Namespace, progress: Progress) -> Outcome:
    """Compile; ends with size, speed, accuracy and the origin of the kernels."""
    config = read_config(options)
    if options.dry_run:
        from bertile import preflight

        return dry_run(options, config, preflight.compiling(options.model, options.output, config))
    from bertile import driver

    summary = driver.compile(options.model, Path(options.output), config, progress)
    return Outcome(summary, as_text(summary, options.model))


def as_text(summary: dict[str, Any], model: str) -> str:
    """The table that ends a compile of a model."""
    from bertile.tune.log.tuning_log import ELSEWHERE

    rows = {
        "bundle": summary["output"],
        "size": size(summary["size_bytes"]),
        "speed": "not measured: the bundle is for another machine"
        if summary["milliseconds"] is None
        else f"{summary['milliseconds']:.2f} ms for {summary['length']} tokens,"
        f" {summary.get('gpu') or str(summary['threads']) + ' threads'}",
        "accuracy": summary["check"],
        "kernels": summary["kernels_in_words"],
    }
    if early := dict(list(summary.get("exits", {}).items())[:-1]):
        words = (f"{milliseconds:.2f} ms behind layer {n}" for n, milliseconds in early.items())
        rows["early exits"] = ", ".join(words)
    if summary.get("road"):
        rows["road"] = summary["road"]
    if summary["kernels"].get(ELSEWHERE):
        rows["faster yet"] = (
            f"bertile tune {model}, then compile again: the log's choices are another processor's"
        )
    return lines(rows)
