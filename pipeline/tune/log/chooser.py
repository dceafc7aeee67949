"""Chooses a kernel's knobs: its own from the log, a near task's, or the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple

from bertile.base.errors import ModelError
from bertile.loader import cpu_features
from bertile.schedules import schedules_for
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target, fits
from bertile.tune.log.tuning_log import ORIGINS, Record, TuningLog
from bertile.tune.measure.trial_runner import TrialRunner

FARTHEST = 3.0  # in doublings of a shape, all axes together: beyond that a record says little
OTHER_FLAG = 0.5  # how far apart two tasks are that differ in their epilogue


class Choice(NamedTuple):
    """``source`` is "tuned", "tuned elsewhere" (on another processor), "estimated" (by a model of
    the machine), "nearest" (the record of another shape) or "default"; ``record`` is the one that
    was chosen, None of a default.
    """

    source: str
    knobs: Knobs
    record: Record | None = None


@dataclass
class Chooser:
    """Chooses knobs from a log, for one row.

    A record that another TVM made names decisions that still apply, but TVM may compile them to
    something else by now: it is built, run and compared with the reference before it is trusted.
    """

    log: TuningLog
    row: Target
    warn: Callable[[str], None]
    choices: dict[Task, Choice] = field(default_factory=dict)  # those of ``knobs``

    def knobs(self, task: Task) -> Knobs:
        """Those of ``choose``, which is asked once for each task."""
        if task not in self.choices:
            self.choices[task] = self.choose(task)
        return self.choices[task].knobs

    def choose(self, task: Task) -> Choice:
        """The knobs that the kernel of ``task`` gets."""
        must_fit(task, self.row)
        for source, record in self._candidates(task):
            if self._trusted(task, record):
                return Choice(source, dict(record.knobs), record)
        return Choice("default", schedules_for(self.row)[task.operation].default(task, self.row))

    def _candidates(self, task: Task) -> Iterator[tuple[str, Record]]:
        valid = schedules_for(self.row)[task.operation].valid
        exact = self.log.best(task, self.row)
        if exact is not None and valid(task, self.row, exact.knobs):
            yield self.log.origin(exact, self.row), exact
        near = [
            (ORIGINS.index(self.log.origin(record, self.row)), far, other.key, record)
            for other in self.log.tasks(self.row)
            if other.operation == task.operation and other != task
            if (far := distance(task, other)) <= FARTHEST
            if (record := self.log.best(other, self.row)) is not None
        ]
        # those of this machine first, however near one of another may be
        for _, _, _, record in sorted(near, key=lambda entry: entry[:3]):
            if valid(task, self.row, record.knobs):
                yield "nearest", record

    def _trusted(self, task: Task, record: Record) -> bool:
        if self.row.kernels_are_text or record.versions.get("apache-tvm") == version("apache-tvm"):
            return True  # kernels for GPUs are text, which TVM has no part in
        if not fits(self.row, cpu_features()):
            self.warn(
                f"{task.name}: a record made with another version of TVM is ignored: it cannot be"
                " checked on this machine"
            )
            return False
        with TrialRunner(self.row) as trials:
            error = trials.run(task, record.knobs, blocks=2).get("error")
        if error:
            self.warn(f"{task.name}: a record made with another version of TVM is ignored: {error}")
        return error is None


def must_fit(task: Task, row: Target) -> None:
    """Raise ModelError where a kind of machine has no kernel that does what a task asks for, or the
    row is too small for every one.
    """
    schedule = schedules_for(row).get(task.operation)
    lacks = task.operation if schedule is None else schedule.refuses(task)
    if lacks:
        raise ModelError(
            f"{row.name} has no kernel for {lacks}, which the model needs ({task.name})",
            "compile it for another kind of machine",
        )
    if not all(schedule.space(task, row).values()):
        raise ModelError(
            f"no kernel of {task.name} fits {row.name}",
            "compile in another precision, or for another target",
        )


def distance(task: Task, other: Task) -> float:
    """How many doublings apart two shapes are, all axes together; infinite across operations."""
    if task.operation != other.operation or set(task.shape) != set(other.shape):
        return math.inf
    total = 0.0
    for axis, value in task.shape.items():
        theirs = other.shape[axis]
        if isinstance(value, (bool, str)) or isinstance(theirs, (bool, str)):
            total += OTHER_FLAG * (value != theirs)
        elif isinstance(value, int) and value > 0 and theirs > 0:
            total += abs(math.log2(value / theirs))
    return total
