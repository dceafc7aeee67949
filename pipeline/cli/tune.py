"""Runs `bertile tune`: a search, or what its flags ask for instead of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TUNING_FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--tune", "none|quick|full", str, "how long to search for faster kernels"),
    ("--trials", "N", int, "kernels to try while tuning, instead of what --tune says"),
    ("--timeout", "SECONDS", float, "stop tuning after this time"),
    ("--runner", "local|mca", str, "tune by running kernels here, or by llvm-mca's estimate"),
    ("--rpc-tracker", "HOST:PORT", str, "tune on the devices of this RPC tracker"),
    ("--rpc-key", "KEY", str, "which of its devices"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What takes the place of a search."""
    group = parser.add_argument_group("the log, in place of tuning")
    add = group.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="what has been tuned: a line per task")
    add("--best", action="store_true", help="the best knobs of each task")
    add("--merge", metavar="FILE|DIR", nargs="+", help="add the records of other logs to yours")
    add("--pack", metavar="FILE", help="write candidates to be measured on a device")
    add("--ingest", metavar="RESULT", nargs="+", help="add what a device measured")


def pack(options: argparse.Namespace, config: Any, progress: Any) -> dict[str, Any]:
    """Write the next round of candidates for MODEL, for bertile-run --measure or a GPU's Python."""
    from bertile import backends, driver, loader
    from bertile.targets import rows
    from bertile.tune.archive import packer
    from bertile.tune.log.tuning_log import TuningLog

    loader.set_thread_defaults()
    row = rows.resolve(config.target, config.threads)
    log = TuningLog.open(config.log_dir, progress.say, config.shipped_log)
    tasks, others = driver.tasks(options.model, log, row, config, progress)
    with progress.stage("pack") as stage:
        kind = backends.of(row).pack()
        counts = packer.pack(tasks, others, log, row, config, Path(options.pack), progress, kind)
        stage.detail = f"{counts['candidates']} candidates of {counts['tasks']} tasks"
    return counts


def ingest(options: argparse.Namespace, config: Any, progress: Any) -> list[dict[str, Any]]:
    """Bring the times of devices into the log."""
    from bertile.tune.archive import ingester
    from bertile.tune.log.tuning_log import TuningLog

    log = TuningLog.open(config.log_dir, progress.say, config.shipped_log)
    return [ingester.ingest(Path(path), log, progress) for path in options.ingest]
