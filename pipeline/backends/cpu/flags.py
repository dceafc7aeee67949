"""Refuses what a compile for a processor is asked for and cannot do here."""

from __future__ import annotations

from bertile.backends.cpu import precisions
from bertile.bundle import runtime_libraries
from bertile.config import Config
from bertile.run import opener
from bertile.targets import linker
from bertile.targets.rows import Target


def check(config: Config, row: Target) -> None:
    """UsageError or PlatformError, before anything takes time."""
    precisions.check(config.precision, row)
    linker.link_command(row)
    if config.max_drop is not None:
        opener.must_run(row)
    if config.runtime == "include":
        runtime_libraries.check(row, config.runtime_from)
