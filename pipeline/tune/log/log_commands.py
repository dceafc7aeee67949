"""Shows what a tuning log holds, and adds other logs' records to it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bertile.base import machine
from bertile.base.errors import PlatformError, UsageError
from bertile.base.progress import Progress
from bertile.base.tables import table
from bertile.schedules.task import Task
from bertile.targets import rows as targets
from bertile.tune.log.tuning_log import Record, TuningLog, fastest, surely

# Both become parts of a path in our own log.
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class Group(NamedTuple):
    """The records of one task that can be compared: of one processor and number of threads."""

    target: str
    processor: str
    threads: int
    task: Task
    records: list[Record]


def tasks(log: TuningLog, target: str | None = None) -> list[dict[str, Any]]:
    """A row per task, processor and number of threads, this machine's first: trials, the time of
    what `best` shows, when last, which TVM.
    """
    return [
        {
            **_heading(group),
            "trials": len(group.records),
            "failed": sum(not record.microseconds for record in group.records),
            "estimated": sum(record.estimated for record in group.records),
            "best_us": chosen.median if (chosen := _chosen(group)) else None,
            "when": max(record.time for record in group.records),
            "tvm": ", ".join(
                sorted({record.versions.get("apache-tvm", "?") for record in group.records})
            ),
        }
        for group in _mine_first(groups(log, target))
    ]


def best(log: TuningLog, target: str | None = None) -> list[dict[str, Any]]:
    """A row per task, processor and number of threads that any candidate worked for, this machine's
    first, with its knobs.
    """
    return [
        {
            **_heading(group),
            "best_us": chosen.median,
            "estimated": chosen.estimated,
            "knobs": dict(chosen.knobs),
        }
        for group in _mine_first(groups(log, target))
        if (chosen := _chosen(group))
    ]


def _heading(group: Group) -> dict[str, Any]:
    """What every row begins with."""
    return {
        "operation": group.task.operation,
        "shape": _shape(group.task),
        "target": group.target,
        "processor": group.processor,
        "threads": group.threads,
    }


def _chosen(group: Group) -> Record | None:
    """What a build would take of these records; None where no candidate worked."""
    worked = [record for record in group.records if record.microseconds]
    candidates = [record for record in worked if not record.estimated] or worked
    if not candidates:
        return None
    row = next((row for row in targets.TABLE if row.log == group.target), None)
    if row is None:  # another version's: which lengths count is not known
        return min(candidates, key=lambda record: record.median)
    chosen = fastest(candidates, row)
    return surely(chosen, group.records, row) if chosen.estimated else chosen


def _mine_first(all_groups: Iterable[Group]) -> list[Group]:
    """The groups of this machine's row before others, and in a row those of its processor."""
    try:
        mine = targets.native().log
    except PlatformError:  # no row fits this machine
        mine = None
    here = machine.in_words(machine.processor())
    return sorted(all_groups, key=lambda group: (group.target != mine, group.processor != here))


def groups(log: TuningLog, target: str | None = None) -> Iterator[Group]:
    """The records of each task; `target` is a row's name, or None for all."""
    names = log.targets() if target is None else [targets.resolve(target).log]
    for name in names:
        by_task: dict[tuple[str, str, str, int], list[Record]] = defaultdict(list)
        for record in log.all_records(name):
            task, processor = record.task, machine.in_words(record.machine)
            by_task[task.operation, task.key, processor, record.threads].append(record)
        for (_, _, processor, threads), records in sorted(by_task.items()):
            yield Group(name, processor, threads, records[0].task, records)


def merge(log: TuningLog, sources: Sequence[Path], progress: Progress) -> dict[str, Any]:
    """Append to our log the records of files and directories that it lacks, one write a record.

    Lines that are no usable record are reported and left out; a stop at any moment leaves whole
    records, and running it again adds the rest.
    """
    known: dict[str, set[str]] = {}
    counts = {"added": 0, "known": 0, "bad": 0}
    for path in _files(sources):
        bad = []
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = usable(line)
                except ValueError:
                    bad.append(number)
                    continue
                ours = known.get(record.target)
                if ours is None:
                    ours = {logged.to_line() for logged in log.all_records(record.target)}
                    known[record.target] = ours
                if record.to_line() in ours:
                    counts["known"] += 1
                    continue
                log.append(record)
                ours.add(record.to_line())
                counts["added"] += 1
        if bad:
            progress.say(
                f"{path}: line {', '.join(map(str, bad))} is not a tuning record and is skipped"
            )
        counts["bad"] += len(bad)
    return {"log": str(log.directories[-1]), **counts}


def usable(line: str) -> Record:
    """The record of a line that someone else wrote; ValueError for what must not enter our log."""
    record = Record.from_line(line)
    names = (record.operation, record.target)
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ValueError("the operation or the target is not a name")
    numbers = [*record.microseconds, record.threads, record.tokens]
    if not all(_is_number(value) and value > 0 for value in numbers):
        raise ValueError("a time or a count is not a positive number")
    kinds = (record.shape, record.knobs, record.machine, record.versions)
    if not all(isinstance(value, dict) for value in kinds) or not isinstance(record.time, str):
        raise ValueError("a field has another type")
    if not all(_is_number(value) for value in record.knobs.values()):
        raise ValueError("a knob is not a number")
    return record


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows of equal keys."""
    if not rows:
        return "the log is empty"
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return table([name.replace("_us", " us") for name in rows[0]], cells)


def _files(sources: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise UsageError(f"there is no log '{source}'", "give .jsonl files or directories")
        files = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
        if not files:
            raise UsageError(f"'{source}' has no .jsonl file in it")
        paths += files
    return paths


def _shape(task: Task) -> dict[str, Any]:
    return dict(task.shape)


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{name}={_short(knob)}" for name, knob in value.items()) or None
    return value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
