"""Searches the knobs of tasks, and writes what it measures into the log.

Every trial is recorded at once, so a stop at any moment loses nothing. What another processor's
log says is tried first, and counts for nothing more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from statistics import median
from types import MappingProxyType
from typing import Any

from bertile import loader
from bertile.base.machine import processor
from bertile.base.progress import Bar, Progress
from bertile.config import Config
from bertile.schedules import BLOCK_TOKENS, schedules_for
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import TRIAL_BLOCKS, Target, tvm_target
from bertile.tune.log.tuning_log import (
    Record,
    TuningLog,
    fair_time,
    last_contest,
    missing,
)
from bertile.tune.measure import runners
from bertile.tune.measure.runners import Runner, answers

BLOCKS = TRIAL_BLOCKS


@dataclass(frozen=True)
class Effort:
    """How much searching is enough: trials of a task, all runs together, and seconds of one run.

    With ``patience``, a search also ends when for so many rounds no task has improved by 1%.
    """

    trials: int
    seconds: float
    patience: int | None = None


# "auto" searches nothing: it measures what another machine's log promises, and the default.
EFFORTS = {
    "auto": Effort(0, 5.0),
    "quick": Effort(32, 600.0),
    "full": Effort(2000, 7200.0, patience=24),
}
ROUND = 8  # trials between two trainings of the cost model, and between two of the reference
SLOW = 1.15  # of the reference's best time: from here on, what was measured is measured again
REPEATS = 3  # of one round, before its times are taken as they are
PAUSE = 0.5  # seconds before a round is repeated
IMPROVEMENT = 0.99
# Times a layer's own kernel: a kernel that it could have instead is searched where its default
# takes less. A search makes kernels of BERT's about so much faster.
PROMISING = 1.5


# A search ends with contests: the best knobs of a kernel, and of another that its layers could have
# and that takes at most so many times as long, are measured in turns, so that no spell in which the
# machine was fast or slow decides between them.
CLOSE = 2.0
FINALISTS = 3  # of a kernel, and the default
TURNS = 5
TURNS_SHARE = 0.25  # of a search's time


# A product of fp32 that every processor's schedules have, and whose speed is the machine's.
REFERENCE = Task("dense", {"inputs": 768, "outputs": 768, "activation": "none", "residual": False})


class _Enough(Exception):
    """Ends a search from inside a measurement, with what to say of it."""


def tune(
    tasks: Counter[Task],
    log: TuningLog,
    row: Target,
    config: Config,
    progress: Progress,
    others: Mapping[Task, Task | None] = MappingProxyType({}),
    open_runner: Callable[[Target, Config], Runner] = runners.open_runner,
) -> dict[str, Any]:
    """Search the spaces of these tasks, each counted as often as the model calls it.

    With the effort "auto", only choose between what the log has of another machine and the default.

    Of `others`, kernels that a layer could have in place of its own, the default is measured, so
    that the choice between them need not be estimated again; and they are searched too where it
    comes near to the layer's own, which each is given with. The best knobs of each are measured in
    turns at the end. Trials that the log already has are not repeated: with as many as the effort
    asks for, nothing runs. Ctrl-C ends the search in order; what was measured is in the log.
    `open_runner` says who measures; the default is for processors.
    """
    effort = EFFORTS[config.tune]
    wanted = 0 if config.tune == "auto" else config.trials or effort.trials
    estimates = config.runner == "mca"
    if config.tune == "auto":
        open_tasks, others = unsettled(tasks, log, row), {}
    else:
        open_tasks = [task for task in tasks if _missing(task, log, row, wanted, estimates)]
    began = time.monotonic()
    with open_runner(row, config) as trials:
        deadline = began + (config.timeout or effort.seconds)
        # Five seconds have no time for a reference, and a GPU's schedules have no such task.
        paced = config.tune != "auto" and not estimates and trials.parallel == 1
        paced = paced and not row.kernels_are_text
        reserved = TURNS_SHARE * (deadline - began) if paced else 0.0
        session = _Session(
            *(log, row, trials, progress, deadline - reserved, effort.patience, estimates, paced)
        )
        stopped = ""
        try:
            stopped += _search(session, open_tasks, tasks, wanted, others)
            if paced:
                stopped += _in_turns(session, tasks, others, deadline)
        except KeyboardInterrupt:
            stopped += ", stopped by Ctrl-C; the best so far is in the log"
        if session.repeated:
            stopped += f", {session.repeated} of them again after a slow spell"
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
    others: Mapping[Task, Task | None],
) -> str:
    """Defaults first, so that a short search never ends behind them; then MetaSchedule."""
    log, row, estimates = session.log, session.row, session.estimates
    unknown = [task for task in others if not log.tuned(task, row, estimates)]
    may = [task for task in unknown if others[task]] + _rivals(session, others, wanted)
    if not open_tasks and not unknown and not may:
        return ", everything is tuned already"
    searched = [*open_tasks, *dict.fromkeys(may)]
    missing = sum(_missing(task, log, row, wanted, estimates) for task in searched)
    first = [
        (task, knobs)
        for task in (*open_tasks, *unknown)
        for knobs in _first(task, log, row, estimates)
    ]
    total = max(missing + len(unknown), len(first))
    if wanted:
        left = max(0.0, session.deadline - time.monotonic())
        session.progress.say(
            f"plan: at most {total} trials, {wanted} of each of {len(searched)} kernels,"
            f" and at most {left:.0f} s"
        )
    with session.progress.bar("trials", total) as session.bar:
        return _measured(session, first, open_tasks, tasks, wanted, others)


def _measured(
    session: _Session,
    first: list[tuple[Task, Knobs]],
    open_tasks: list[Task],
    tasks: Counter[Task],
    wanted: int,
    others: Mapping[Task, Task | None],
) -> str:
    from bertile.tune.search.search import search

    row, schedules = session.row, schedules_for(session.row)
    try:
        for begin in range(0, len(first), ROUND):
            session.measure(first[begin : begin + ROUND])
        calls = {task: tasks[task] for task in open_tasks}
        calls |= {task: tasks[others[task]] for task in _rivals(session, others, wanted)}
        if not calls or not wanted:
            return ""
        spaces = [
            (task, schedules[task.operation].space(task, row), float(count))
            for task, count in calls.items()
        ]
        missing = sum(_missing(task, session.log, row, wanted, session.estimates) for task in calls)
        search(spaces, session.measure, missing, wanted, ROUND, 0, tvm_target(row))
    except _Enough as reason:
        return f", {reason}"
    return ""


def _in_turns(
    session: _Session, tasks: Counter[Task], others: Mapping[Task, Task | None], deadline: float
) -> str:
    """Measure the best knobs of each task, and of what its layers could have instead, one directly
    after the other; all layers before any for the second time, so that each has a turn where time
    is short.
    """
    contests = {uuid.uuid4().hex[:12]: each for each in _contests(session, tasks, others)}
    count = 0
    if contests:
        session.progress.say(f"turns: the best knobs of {len(contests)} layers beside each other")
    for number in range(TURNS):
        for name, candidates in contests.items():
            for candidate in candidates:
                if time.monotonic() > deadline:
                    return f", {count} of them in turns, out of time"
                session.take_turn(*candidate, f"{name}.{number}")
                count += 1
    return f", {count} of them in turns" if count else ""


def _contests(
    session: _Session, tasks: Counter[Task], others: Mapping[Task, Task | None]
) -> list[list[tuple[Task, Knobs]]]:
    """For each kind of layer the knobs that are near the fastest of its kernel, and of those that
    it could have instead if they are about as fast; where they were not measured in turns yet. What
    takes most of a request comes first.
    """
    log, row, contests = session.log, session.row, []
    groups = {task: [task] for task in tasks}
    for other, own in others.items():
        if own in groups:
            groups[own].append(other)
    for own, group in groups.items():
        best = {task: log.best(task, row) for task in group if log.tuned(task, row)}
        times = {task: fair_time(record, row) for task, record in best.items() if record}
        if own not in times:
            continue
        near = [task for task in times if 1 / CLOSE < times[task] / times[own] < CLOSE]
        finalists = [(task, knobs) for task in near for knobs in _finalists(session, task)]
        in_turns = all(log.shares(own, task, row) for task in near)
        if len(finalists) > 1 and not (
            in_turns and all(_had_a_turn(session, *f) for f in finalists)
        ):
            contests.append((tasks[own] * times[own], finalists))
    return [finalists for _, finalists in sorted(contests, key=lambda entry: -entry[0])]


def _finalists(session: _Session, task: Task) -> list[Knobs]:
    """The default knobs of a task, and those that took least in any trial."""
    log, row = session.log, session.row
    default = schedules_for(row)[task.operation].default(task, row)
    records = [record for record in log.tuned(task, row) if record.microseconds]
    records.sort(key=lambda record: (missing(record, row), fair_time(record, row)))
    finalists: list[Knobs] = []
    for knobs in (dict(record.knobs) for record in records):
        if knobs not in finalists and len(finalists) < FINALISTS:
            finalists.append(knobs)
    known = [dict(record.knobs) for record in records]
    return finalists + [default] * (default in known and default not in finalists)


def _had_a_turn(session: _Session, task: Task, knobs: Knobs) -> bool:
    records = session.log.tuned(task, session.row)
    return any(record.turn and dict(record.knobs) == knobs for record in records)


def _rivals(session: _Session, others: Mapping[Task, Task | None], wanted: int) -> list[Task]:
    """Of kernels that layers could have instead, those that are worth a search."""
    log, row, rivals = session.log, session.row, []
    for task, own in others.items():
        mine, theirs = log.best(task, row), own and log.best(own, row)
        if not mine or not theirs or not _missing(task, log, row, wanted, session.estimates):
            continue
        if _steady(mine, (mine, theirs)) < PROMISING * _steady(theirs, (mine, theirs)):
            rivals.append(task)
    return rivals


def unsettled(tasks: Iterable[Task], log: TuningLog, row: Target) -> list[Task]:
    """The tasks for which the log has other knobs than the default, of another machine alone."""
    return [
        task
        for task in tasks
        if not log.tuned(task, row) and len(_first(task, log, row, estimates=False)) > 1
    ]


def _first(task: Task, log: TuningLog, row: Target, estimates: bool) -> list[Knobs]:
    """What is tried before a search begins: the knobs of another machine's log, the default."""
    schedule = schedules_for(row)[task.operation]
    default, prior = schedule.default(task, row), log.best(task, row)
    if prior is None or estimates or not schedule.valid(task, row, prior.knobs):
        return [default]
    return [dict(prior.knobs), *([default] if dict(prior.knobs) != dict(default) else [])]


@dataclass
class _Session:
    """One run of the tuner: measures candidates that the log does not know, and records them.

    The machine may slow to half its speed for seconds or minutes. So a reference kernel is timed
    between rounds, and a round on whose either side it was slow is measured again.
    """

    log: TuningLog
    row: Target
    trials: Runner
    progress: Progress
    deadline: float
    patience: int | None
    estimates: bool = False  # by a model of the machine: what was measured need not be
    paced: bool = False  # whether the reference is timed: where it is this machine that measures
    idle: int = 0  # trials since a task last improved by 1%
    count: int = 0
    bar: Bar | None = None
    repeated: int = 0
    pace: float | None = None  # of the reference now, in microseconds
    fastest: float | None = None

    def measure(self, candidates: Sequence[tuple[Task, Knobs]]) -> list[list[float]]:
        """Each record's microseconds by the lengths that count; empty for one that failed."""
        records = [self._known(*candidate) for candidate in candidates]
        fresh = [index for index, record in enumerate(records) if record is None]
        if fresh and self.pace is None:
            self._take_pace()
        for attempt in range(REPEATS if fresh else 0):
            if attempt:
                self.repeated += len(fresh)
                time.sleep(PAUSE)
                self._take_pace()
            before = self.pace
            outcomes = answers(
                self.trials, [candidates[i] for i in fresh], BLOCKS, self.row.also_blocks
            )
            try:
                for index in fresh:
                    records[index] = self._tried(*candidates[index], outcomes, again=attempt > 0)
            finally:
                outcomes.close()
            self._take_pace()
            if not self._is_slow(before) and not self._is_slow(self.pace):
                break
        return [[fair_time(record, self.row)] if record.microseconds else [] for record in records]

    def take_turn(self, task: Task, knobs: Knobs, turn: str) -> None:
        """Measure knobs again, in their turn."""
        outcome = self.trials.run(task, knobs, BLOCKS, self.row.also_blocks)
        again = self._record(task, knobs, outcome)
        self.log.append(dataclasses.replace(again, reference=None, turn=turn))
        self.count += 1

    def _take_pace(self) -> None:
        """Time the reference kernel."""
        if not self.paced:
            return
        task = REFERENCE
        knobs = schedules_for(self.row)[task.operation].default(task, self.row)
        times = self.trials.run(task, knobs, BLOCKS).get("microseconds")
        self.pace = round(min(times), 2) if times else None
        if self.pace:
            self.fastest = min(self.fastest or self.pace, self.pace)

    def _is_slow(self, pace: float | None) -> bool:
        return pace is not None and pace > SLOW * (self.fastest or pace)

    def _known(self, task: Task, knobs: Knobs) -> Record | None:
        """What the log says of this candidate on this machine; an estimate is no measurement."""
        known = self.log.tuned(task, self.row, self.estimates)
        return next((r for r in reversed(known) if dict(r.knobs) == dict(knobs)), None)

    def _tried(
        self, task: Task, knobs: Knobs, outcomes: Iterator[dict[str, Any]], again: bool
    ) -> Record:
        """The record of the candidate whose answer comes next; trying `again` is no progress."""
        if time.monotonic() > self.deadline:
            raise _Enough("out of time")
        if self.patience and self.idle >= self.patience * ROUND:
            raise _Enough(f"no task improved by 1% in {self.patience} rounds")
        before = self.log.best(task, self.row)
        record = self._record(task, knobs, next(outcomes))
        self.count += 1
        bar = fair_time(before, self.row) if before else float("inf")
        better = bool(record.microseconds) and fair_time(record, self.row) < IMPROVEMENT * bar
        self.idle = 0 if better else self.idle + 1
        self.log.append(record)
        self._show(task, steps=0 if again else 1)
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
            reference=self.pace,
        )

    def _show(self, task: Task, steps: int) -> None:
        best = self.log.best(task, self.row)
        so_far = f"best {best.median:.0f} us" if best else "no success so far"
        if self.bar is not None:
            self.bar.advance(steps, note=f"{task.name}, {so_far}")


def _rounded(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(us, 2) for us in times)


def machine_facts(row: Target) -> dict[str, Any]:
    """What a reader of a record wants to know of the machine it was measured on."""
    return {**processor(), "cores": loader.available_cores(), "row": row.name}


def _missing(task: Task, log: TuningLog, row: Target, wanted: int, estimates: bool) -> int:
    """How many trials a task still wants: as many as asked for, or as its whole space has.

    A sparse kernel without zeros to skip, which --sparse always makes, wants none.
    """
    if task.shape.get("density") == 100:  # percent
        return 0
    points = 1
    for choices in schedules_for(row)[task.operation].space(task, row).values():
        points *= len(choices)
    done = len({json.dumps(dict(r.knobs)) for r in log.tuned(task, row, estimates)})
    return max(0, min(wanted, points) - done) if points > 1 else 0


def _gains(tasks: Counter[Task], log: TuningLog, row: Target) -> str:
    """How much faster the best settings are than the defaults, over a whole request: by the turns
    of their contest, where there was one.
    """
    before = after = 0.0
    for task, calls in tasks.items():
        default = schedules_for(row)[task.operation].default(task, row)
        best = log.best(task, row)
        if best is None:
            continue
        tuned = log.tuned(task, row, estimates=best.estimated)
        turns = last_contest(tuned)
        shares = [_least(turn, default) / _least(turn, best.knobs) for turn in turns]
        share = median(shares) if turns else _least(tuned, default) / best.median
        if math.isfinite(share):  # the default was measured
            before += calls * best.median * share
            after += calls * best.median
    return f"kernels {before / 1e3:.2f} ms → {after / 1e3:.2f} ms a request" if after else ""


def _least(records: Iterable[Record], knobs: Knobs) -> float:
    """The least median of the records with these knobs, infinite without one."""
    times = [record.median for record in records if dict(record.knobs) == dict(knobs)]
    return min(times, default=math.inf)


def _steady(record: Record, beside: Sequence[Record]) -> float:
    """The microseconds of a record, as if the machine had been as fast as at the best of these."""
    paces = [other.reference for other in beside if other.reference]
    slowed = record.reference / min(paces) if record.reference else 1.0
    return record.median / slowed
