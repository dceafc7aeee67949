"""Writes the next round of candidates for a device that no network reaches into an archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bertile.base import scratch
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.archive.proposer import propose
from bertile.tune.log.tuning_log import TuningLog

SCHEMA = 1
CANDIDATES = 16  # of a task in one archive


def pack(
    tasks: Counter[Task],
    others: Sequence[Task],
    log: TuningLog,
    row: Target,
    config: Config,
    path: Path,
    progress: Progress,
    kind: Any,
) -> dict[str, Any]:
    """Write the next round of candidates for a device, in an archive of its `kind`.

    Of ``others``, which a layer could have instead of its own, the default alone.
    """
    wanted = config.trials or CANDIDATES
    rounds = {task: _next(task, log, row, wanted) for task in tasks}
    rounds |= {task: _next(task, log, row, 1) for task in others if not _known(task, log, row)}
    rounds = {task: candidates for task, candidates in rounds.items() if candidates}
    with scratch.directory("pack-") as directory:
        total = sum(map(len, rounds.values()))
        written = kind(Path(directory), row, progress, total)
        for task, candidates in rounds.items():
            written.add(task, candidates)
        if written.candidates:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.part")
            try:
                written.write(partial, _header(row))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return {
        "archive": str(path) if written.candidates else None,
        "tasks": len(written.tasks),
        "candidates": len(written.candidates),
        "size_bytes": path.stat().st_size if written.candidates else 0,
    }


def _header(row: Target) -> dict[str, Any]:
    """What a manifest says of any archive."""
    return {
        "schema": SCHEMA,
        "target": {"name": row.name, "arch": row.arch, "features": list(row.features)},
        "log": row.log,
        "threads": row.threads,
        "versions": {
            package: version(package) for package in ("bertile", "apache-tvm", "apache-tvm-ffi")
        },
    }


def _known(task: Task, log: TuningLog, row: Target) -> list:
    """What was measured of a task on as many threads."""
    records = log.records(task, row)
    return [record for record in records if record.threads == row.threads and not record.estimated]


def _next(task: Task, log: TuningLog, row: Target, count: int) -> list[Knobs]:
    return propose(task, row, _known(task, log, row), count)
