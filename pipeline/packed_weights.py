"""The weights of a lowered module: packed for the kernel that reads them, one parameter each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Knobs
from bertile.schedules.task import Task


class PackedWeights:
    """Variables and values of the new parameters, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.variables: dict[str, relax.Var] = {}
        self.values: dict[str, np.ndarray] = {}

    def packed(
        self, task: Task, knobs: Knobs, weights: Sequence[tuple[str, np.ndarray]]
    ) -> list[relax.Var]:
        """The parameters of one kernel call; layers that share weights share them here too."""
        if not weights:
            return []
        names, values = zip(*weights)
        if all(f"{name}@{task.name}" in self.variables for name in names):
            return [self.variables[f"{name}@{task.name}"] for name in names]
        packed = SCHEDULES[task.operation].pack(task, knobs, values)
        packing = "" if all(a is b for a, b in zip(packed, values)) else f"@{task.name}"
        return [self.parameter(f"{n}{packing}", v) for n, v in zip(names, packed)]

    def parameter(self, name: str, value: np.ndarray) -> relax.Var:
        """The parameter of that name, made where there is none yet."""
        if name not in self.variables:
            kind = relax.TensorType(list(value.shape), str(value.dtype))
            self.variables[name] = relax.Var(name, kind)
            self.values[name] = value
        return self.variables[name]
