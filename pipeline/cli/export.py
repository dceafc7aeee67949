"""Runs `bertile export`: the export stage by itself."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.progress import Progress
from bertile.base.tables import lines
from bertile.cli.command import Outcome, add_model, dry_run
from bertile.cli.config_flags import EXPORT_FLAGS, add_config, read_config


def add_arguments(parser: ArgumentParser) -> None:
    """A model, a directory, and what decides how a model is exported."""
    add_model(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="the directory to write"
    )
    add_config(parser, *EXPORT_FLAGS)


def run(options: Namespace, progress: Progress) -> Outcome:
    """Write a directory with model.onnx, export.json and the tokenizer."""
    config = read_config(options)
    if options.dry_run:
        from bertile import preflight

        preflight.exporting(options.model, options.output, config)
        return dry_run(options, config)
    from bertile import driver

    summary = driver.export(options.model, Path(options.output), config, progress)
    return Outcome(summary, lines(summary))
