"""Chooses the smallest kernels, for tests of whole graphs in which no knob matters."""

from __future__ import annotations

from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.tune.log.chooser import Choice, Chooser


class Smallest(Chooser):
    """The lowest value of each knob that the others allow.

    LLVM compiles such a graph several times as fast as with the default knobs, whose kernels are
    unrolled; the schedules' own tests vary them.
    """

    def choose(self, task: Task) -> Choice:
        source, knobs, _ = super().choose(task)
        schedule = schedules_for(self.row)[task.operation]
        for name, values in schedule.space(task, self.row).items():
            smaller = {**knobs, name: min(values)}
            knobs = smaller if schedule.valid(task, self.row, smaller) else knobs
        return Choice(source, knobs)
