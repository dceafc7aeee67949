"""Tasks in, measured knobs in the log out. Every trial is recorded at once, so a stop at any moment
loses nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from bertile import loader
from bertile.base.machine import cpu_name
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.schedules import BLOCK_TOKENS, schedules_for
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target, tvm_target
from bertile.tune.log.tuning_log import Record, TuningLog
from bertile.tune.measure import runners
from bertile.tune.measure.runners import Runner, answers

BLOCKS = 8  # trials run on 128 tokens, the length that most requests are near to,


@dataclass(frozen=True)
class Effort:
    """How much searching is enough: trials of a task, all runs together, and seconds of one run.

    With ``patience``, a search also ends when for so many rounds no task has improved by 1%.
    """

    trials: int
    seconds: float
    patience: int | None = None


EFFORTS = {"quick": Effort(32, 600.0), "full": Effort(2000, 7200.0, patience=24)}
ROUND = 8  # trials between two trainings of the cost model
IMPROVEMENT = 0.99


class _Enough(Exception):
    """Ends a search from inside a measurement, with what to say of it."""


def tune(
    tasks: Counter[Task],
    log: TuningLog,
    row: Target,
    config: Config,
    progress: Progress,
    others: Sequence[Task] = (),
    open_runner: Callable[[Target, Config], Runner] = runners.open_runner,
) -> dict[str, Any]:
    """Search the spaces of these tasks, each counted as often as the model calls it.

    Of `others`, which a layer could have in place of its own, the default is measured, so that the
    choice between them need not be estimated again. Trials that the log already has are not
    repeated: with as many as the effort asks for, nothing runs. Ctrl-C ends the search in order;
    what was measured is in the log.
    `open_runner` says who measures; the default is for processors.
    """
    effort = EFFORTS[config.tune]
    wanted = config.trials or effort.trials
    estimates = config.runner == "mca"
    open_tasks = [task for task in tasks if _missing(task, log, row, wanted, estimates)]
    others = [task for task in others if not _done(task, log, row, estimates)]
    began = time.monotonic()
    with open_runner(row, config) as trials:
        deadline = began + (config.timeout or effort.seconds)
        session = _Session(log, row, trials, progress, deadline, effort.patience, estimates)
        stopped = _search(session, open_tasks, tasks, wanted, others)
    best = _gains(tasks, log, row)
    seconds = time.monotonic() - began
    each = f" ({seconds / session.count:.2f} s each)" if session.count else ""
    text = f"{session.count} trials{each}{stopped}" + (f", {best}" if best else "")
    return {"trials": session.count, "seconds": seconds, "text": text}


def _search(
    session: _Session,
    open_tasks: list[Task],
    tasks: Counter[Task],
    wanted: int,
    others: Sequence[Task],
) -> str:
    """Defaults first, so that a short search never ends behind them; then MetaSchedule."""
    if not open_tasks and not others:
        return ", everything is tuned already"
    from bertile.tune.search.search import search

    row = session.row
    estimates = session.estimates
    missing = sum(_missing(task, session.log, row, wanted, estimates) for task in open_tasks)
    session.total = missing + len(others)
    schedules = schedules_for(row)
    try:
        all_tasks = (*open_tasks, *others)
        session.measure(
            [(task, schedules[task.operation].default(task, row)) for task in all_tasks]
        )
        if not open_tasks:
            return ""
        spaces = [
            (task, schedules[task.operation].space(task, row), float(tasks[task]))
            for task in open_tasks
        ]
        search(spaces, session.measure, missing, wanted, ROUND, 0, tvm_target(row))
    except _Enough as reason:
        return f", {reason}"
    except KeyboardInterrupt:
        return ", stopped by Ctrl-C; the best so far is in the log"
    return ""


@dataclass
class _Session:
    """One run of the tuner: measures candidates that the log does not know, and records them."""

    log: TuningLog
    row: Target
    trials: Runner
    progress: Progress
    deadline: float
    patience: int | None
    estimates: bool = False  # by a model of the machine: what was measured need not be
    idle: int = 0  # trials since a task last improved by 1%
    count: int = 0
    total: int = 0

    def measure(self, candidates: Sequence[tuple[Task, Knobs]]) -> list[list[float]]:
        """Each record's median microseconds; empty for a candidate that failed."""
        known = [self._known(*candidate) for candidate in candidates]
        fresh = [candidate for candidate, record in zip(candidates, known) if record is None]
        outcomes = answers(self.trials, fresh, BLOCKS, self.row.also_blocks)
        try:
            records = [
                record or self._tried(*candidate, outcomes)
                for candidate, record in zip(candidates, known)
            ]
        finally:
            outcomes.close()
        return [[record.median] if record.microseconds else [] for record in records]

    def _known(self, task: Task, knobs: Knobs) -> Record | None:
        """What the log says of this candidate on as many threads; an estimate is no measurement."""
        known = [r for r in self.log.records(task, self.row) if dict(r.knobs) == dict(knobs)]
        known = [r for r in known if r.threads == self.row.threads]
        return next((r for r in reversed(known) if self.estimates or not r.estimated), None)

    def _tried(self, task: Task, knobs: Knobs, outcomes: Iterator[dict[str, Any]]) -> Record:
        """The record of the candidate whose answer comes next."""
        began = time.monotonic()
        if began > self.deadline:
            raise _Enough("out of time")
        if self.patience and self.idle >= self.patience * ROUND:
            raise _Enough(f"no task improved by 1% in {self.patience} rounds")
        before = self.log.best(task, self.row)
        record = self._record(task, knobs, next(outcomes))
        self.count += 1
        better = record.median < IMPROVEMENT * (before.median if before else float("inf"))
        self.idle = 0 if better else self.idle + 1
        self.log.append(record)
        self._show(task, time.monotonic() - began)
        return record

    def _record(self, task: Task, knobs: Knobs, outcome: dict[str, Any]) -> Record:
        return Record(
            operation=task.operation,
            shape=dict(task.shape),
            target=self.row.log,
            threads=self.row.threads,
            tokens=BLOCKS * BLOCK_TOKENS,
            dtype=str(task.shape.get("precision", "float32")),
            knobs=dict(knobs),
            microseconds=_rounded(outcome.get("microseconds", ())),
            also={tokens: _rounded(times) for tokens, times in outcome.get("also", {}).items()},
            machine=outcome.get("machine") or machine_facts(self.row),
            versions={name: version(name) for name in ("bertile", "apache-tvm", "apache-tvm-ffi")},
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            error=outcome.get("error"),
            estimated=self.estimates,
        )

    def _show(self, task: Task, seconds: float) -> None:
        best = self.log.best(task, self.row)
        left = max(0, self.total - self.count) * seconds
        self.progress.status(
            f"tune      {task.name}  trial {self.count} of {self.total}"
            f"  best {best.median:.0f} us  ETA {left:.0f} s"
            if best
            else f"tune      {task.name}  trial {self.count} of {self.total}  none works so far"
        )


def _rounded(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(us, 2) for us in times)


def machine_facts(row: Target) -> dict[str, Any]:
    """What a reader of a record wants to know of the machine it was measured on."""
    return {"cpu": cpu_name(), "cores": loader.available_cores(), "row": row.name}


def _done(task: Task, log: TuningLog, row: Target, estimates: bool) -> int:
    """How many trials the log has of a task; estimates count only where more of them are made."""
    records = [r for r in log.records(task, row) if r.threads == row.threads]
    return sum(estimates or not record.estimated for record in records)


def _missing(task: Task, log: TuningLog, row: Target, wanted: int, estimates: bool) -> int:
    """How many trials a task still wants: as many as asked for, or as its whole space has.

    A sparse kernel without zeros to skip, which --sparse always makes, wants none.
    """
    if task.shape.get("density") == 100:  # percent
        return 0
    points = 1
    for choices in schedules_for(row)[task.operation].space(task, row).values():
        points *= len(choices)
    done = _done(task, log, row, estimates)
    return max(0, min(wanted, points) - done) if points > 1 else 0


def _gains(tasks: Counter[Task], log: TuningLog, row: Target) -> str:
    """How much faster the best knobs are than the defaults, over a whole request."""
    before = after = 0.0
    for task, calls in tasks.items():
        default = schedules_for(row)[task.operation].default(task, row)
        records = [r for r in log.records(task, row) if dict(r.knobs) == default and r.microseconds]
        records = [r for r in records if r.threads == row.threads]
        best = log.best(task, row)
        records = [r for r in records if best and r.estimated == best.estimated]
        if best and records:
            before += calls * min(record.median for record in records)
            after += calls * best.median
    return f"kernels {before / 1e3:.2f} ms → {after / 1e3:.2f} ms a request" if after else ""
