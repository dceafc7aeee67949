"""One kernel at a time: built for a target row, called on guarded memory, held to its sample."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi

from bertile import targets
from bertile.loader import cpu_features
from bertile.schedules.cpu import SCHEDULES

GUARD = 4096  # values on both sides of each tensor
UNTOUCHED = 123456.0


def guarded(array: np.ndarray, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """A copy on a multiple of 64 bytes with ``outside`` around it, and the memory it lies in."""
    memory = np.full(array.size + 2 * GUARD + 64, outside, array.dtype)
    start = GUARD + -memory[GUARD:].ctypes.data % 64 // array.itemsize
    inside = memory[start : start + array.size].reshape(array.shape)
    inside[...] = array
    return inside, memory


class Kernels:
    """Builds each kernel of one target row once."""

    def __init__(self, row: targets.Target) -> None:
        self.row = row
        self.target = targets.tvm_target(row)
        self.lacks = sorted(set(row.features) - cpu_features())
        self._built: dict = {}

    def build(self, task, knobs=None):
        """The library of a task, with the schedule's own knobs where none are given."""
        schedule = SCHEDULES[task.operation]
        knobs = schedule.default(task, self.row) if knobs is None else knobs
        key = task.key, tuple(sorted(knobs.items()))
        if key not in self._built:
            self._built[key] = self.compile(schedule.kernel(task, knobs, self.row))
        return self._built[key]

    def compile(self, func):
        """The library of a PrimFunc, as ``main``."""
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        return tvm.tirx.build(mod, target=self.target)

    def call(self, library, operands, shape, dtype="float32") -> np.ndarray:
        """The result, after a check that it is written in full and nothing beside it.

        What lies beside an operand is NaN, so that reading it shows too.
        """
        if self.lacks:
            pytest.skip(f"built, but not run: this CPU lacks {' '.join(self.lacks)}")
        tensors = [guarded(one, np.nan if one.dtype.kind == "f" else 0)[0] for one in operands]
        result, memory = guarded(np.full(shape, UNTOUCHED, dtype), UNTOUCHED)
        library["main"](*map(tvm_ffi.from_dlpack, [*tensors, result]))
        assert np.count_nonzero(memory == UNTOUCHED) == memory.size - result.size
        return result

    def difference(self, task, blocks=2, knobs=None, seed=0) -> float:
        """The largest absolute difference to the sample's expected result."""
        schedule = SCHEDULES[task.operation]
        library = self.build(task, knobs)
        knobs = schedule.default(task, self.row) if knobs is None else knobs
        sample = schedule.sample(task, blocks, np.random.default_rng(seed))
        weights = schedule.pack(task, knobs, sample.weights)
        found = self.call(library, [*sample.activations, *weights], sample.expected.shape)
        return float(np.abs(found - sample.expected).max())

    def points(self, task, count, seed=0):
        """Random points of a task's space."""
        rng = np.random.default_rng(seed)
        space = SCHEDULES[task.operation].space(task, self.row)
        for _ in range(count):
            yield {knob: int(rng.choice(values)) for knob, values in space.items()}


@pytest.fixture(scope="session", params=["x86-avx512", "x86-avx2"])
def kernels(request) -> Kernels:
    return Kernels(targets.resolve(request.param, threads=1))
