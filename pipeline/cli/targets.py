"""Runs `bertile targets`: lists every row, and which of them this machine can run."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from bertile.base.progress import Progress
from bertile.cli.command import Outcome


def add_arguments(parser: ArgumentParser) -> None:
    """None: the rows are few enough to list them all."""


def run(options: Namespace, progress: Progress) -> Outcome:
    """The rows, each with "here": whether it runs on this processor or on a GPU in this machine."""
    from bertile.loader import cpu_features
    from bertile.schedules import BLOCK_TOKENS
    from bertile.targets import detect
    from bertile.targets.rows import TABLE, fits, native
    from bertile.targets.table import as_text

    features, card = cpu_features(), detect.gpu()
    runs = [row.name for row in TABLE if fits(row, features)]
    runs += [] if isinstance(card, str) else [row.name for row in detect.rows(card)]
    data = [
        {**dataclasses.asdict(row), "lanes": BLOCK_TOKENS, "here": row.name in runs}
        for row in TABLE
    ]
    return Outcome(data, as_text(runs, native().name if runs else None))
