"""Runs `bertile tune`: a search, or what its flags ask for instead of one."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.base.tables import lines
from bertile.cli.command import Outcome, add_model, dry_run
from bertile.cli.config_flags import FLAGS, TUNING, add_config, read_config

if TYPE_CHECKING:
    from bertile.config import Config

# What a search does not ask: how the bundle is packed. --tune has fewer words than a compile's.
NOT_TUNED = ("tune", "runtime", "libc")


def add_arguments(parser: ArgumentParser) -> None:
    """A model, what takes the place of a search, and what a search asks."""
    add_model(parser, nargs="?")
    group = parser.add_argument_group("what is done instead of tuning")
    add = group.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="list what has been tuned, a line per kernel")
    add("--best", action="store_true", help="list the best settings of each kernel")
    add("--merge", metavar="FILE|DIR", nargs="+", help="add the records of other logs to your log")
    add(
        "--pack",
        metavar="FILE",
        help="write candidate kernels into an archive, to measure on another machine",
    )
    add(
        "--ingest",
        metavar="RESULT",
        nargs="+",
        help="add to your log what another machine measured",
    )
    groups = add_config(parser, *(name for name in FLAGS if name not in NOT_TUNED))
    groups[TUNING].add_argument(
        "--tune",
        metavar="quick|full",
        default=SUPPRESS,
        help="how long to search: quick (default), 10 minutes at most, or full, 2 hours at most",
    )


def run(options: Namespace, progress: Progress) -> Outcome:
    """The tuning stage by itself; the log is what stays. Or what the log holds, and no tuning."""
    config = read_config(options)
    if options.list or options.best or options.merge:
        return _log(options, config, progress)
    if options.ingest:
        return _ingest(options, config, progress)
    if options.model is None:
        raise UsageError(
            "no MODEL to tune was named", "name one, or give --list, --best or --merge"
        )
    if config.tune in ("auto", "none"):
        config = dataclasses.replace(config, tune="quick")
    if options.dry_run:
        from bertile import preflight

        return dry_run(options, config, preflight.tuning(options.model, config))
    if options.pack:
        return _pack(options, config, progress)
    from bertile import driver

    summary = driver.tune_model(options.model, config, progress)
    return Outcome(summary, lines(summary))


def _log(options: Namespace, config: Config, progress: Progress) -> Outcome:
    """What the log holds, or what came into it from others."""
    from bertile.tune.log import log_commands
    from bertile.tune.log.tuning_log import TuningLog

    if options.model is not None:
        raise UsageError(f"unexpected argument '{options.model}'", "a log is not of one model")
    log = TuningLog.open(config.log_dir, progress.say, config.shipped_log)
    if options.merge:
        summary = log_commands.merge(log, list(map(Path, options.merge)), progress)
        return Outcome(summary, lines(summary))
    named = config.target if hasattr(options, "target") else None
    rows = log_commands.best(log, named) if options.best else log_commands.tasks(log, named)
    return Outcome(rows, log_commands.as_text(rows))


def _pack(options: Namespace, config: Config, progress: Progress) -> Outcome:
    """Write the next round of candidates for MODEL, for bertile-run --measure or a GPU's Python."""
    from bertile import backends, driver, loader
    from bertile.targets import rows
    from bertile.tune.archive import packer

    loader.set_thread_defaults()
    row = rows.resolve(config.target, config.threads)
    log = driver.open_log(config, progress)
    tasks, others = driver.tasks(options.model, log, row, config, progress)
    with progress.stage("pack") as stage:
        kind = backends.of(row).pack()
        counts = packer.pack(tasks, others, log, row, config, Path(options.pack), progress, kind)
        stage.detail = f"{counts['candidates']} candidates of {counts['tasks']} tasks"
    return Outcome(counts, lines(counts))


def _ingest(options: Namespace, config: Config, progress: Progress) -> Outcome:
    """Bring the times of devices into the log."""
    from bertile.tune.archive import ingester
    from bertile.tune.log.tuning_log import TuningLog

    log = TuningLog.open(config.log_dir, progress.say, config.shipped_log)
    counts = [ingester.ingest(Path(path), log, progress) for path in options.ingest]
    return Outcome(counts, "\n\n".join(map(lines, counts)))
