"""Packs the weights of a lowered module for the kernels that read them, one parameter each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from tvm import relax

from bertile.schedules import schedules_for
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task
from bertile.targets.rows import Target


class PackedWeights:
    """Variables and values of the new parameters, in the order in which they were asked for.

    ``nonzeros`` counts the lanes that sparse weights are stored with, over all calls of a task.
    """

    def __init__(self, row: Target) -> None:
        self.row, self.schedules = row, schedules_for(row)
        self.variables: dict[str, relax.Var] = {}
        self.values: dict[str, np.ndarray] = {}
        self.nonzeros: Counter[Task] = Counter()
        self._made: dict[tuple[Task, tuple[str, ...]], list[relax.Var]] = {}

    def packed(
        self, task: Task, knobs: Knobs, weights: Sequence[tuple[str, np.ndarray]]
    ) -> list[relax.Var]:
        """The parameters of one kernel call; layers that share weights share them here too."""
        if not weights:
            return []
        names, values = zip(*weights)
        if (task, names) not in self._made:
            self._made[task, names] = self._pack(task, knobs, names, values)
        parameters = self._made[task, names]
        if self.schedules[task.operation].parts:
            self.nonzeros[task] += len(self.values[parameters[0].name])
        return parameters

    def _pack(
        self, task: Task, knobs: Knobs, names: Sequence[str], values: Sequence[np.ndarray]
    ) -> list[relax.Var]:
        schedule = self.schedules[task.operation]
        packed, offset = schedule.pack(task, knobs, values, self.row), f"{names[0]}/offset"
        if schedule.parts:  # all of them, the vectors too, are in an order of this weight's own
            names = [f"{names[0]}/{name}" for name in (*schedule.parts, *names[1:])]
        elif all(a is b for a, b in zip(packed, values)):
            return [self.parameter(name, value) for name, value in zip(names, packed)]
        names = [*names, offset][: len(packed)]  # the offset is of signed bytes
        return [self.parameter(f"{n}@{task.name}", v) for n, v in zip(names, packed, strict=True)]

    def parameter(self, name: str, value: np.ndarray) -> relax.Var:
        """The parameter of that name, made where there is none yet."""
        if name not in self.variables:
            kind = relax.TensorType(list(value.shape), str(value.dtype))
            self.variables[name] = relax.Var(name, kind)
            self.values[name] = value
        return self.variables[name]
