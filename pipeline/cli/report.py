"""Runs `bertile report`: writes one HTML page about a bundle or about a tuning log."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bertile.base.progress import Progress
from bertile.base.tables import lines
from bertile.cli.command import Outcome
from bertile.cli.config_flags import add_some_config, read_config
from bertile.cli.option_lists import LENGTH, positive


def add_arguments(parser: ArgumentParser) -> None:
    """What the page is about, where it is written, and how its kernels are measured."""
    add = parser.add_argument
    add("source", metavar="BUNDLE|LOGDIR", help="a bundle, or the directory of a tuning log")
    add("-o", "--output", metavar="FILE", required=True, help="the HTML page to write")
    add("--no-measure", action="store_true", help="do not time the bundle's kernels")
    add("--batch", metavar="N", type=positive, default=1, help="batch size of the measured call")
    add("--length", metavar="N", type=positive, help=LENGTH)
    add_some_config(parser, "threads", "log-dir")


def run(options: Namespace, progress: Progress) -> Outcome:
    """Write the page; gives what stands in it."""
    from bertile.report import collector

    config = read_config(options)
    summary = collector.write(
        Path(options.source),
        Path(options.output),
        measure=not options.no_measure,
        log_dir=config.log_dir,
        batch=options.batch,
        length=options.length,
        threads=config.threads,
        progress=progress,
    )
    return Outcome(summary, lines(summary))
