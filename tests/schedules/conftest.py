"""One kernel at a time: built for a target row, called on guarded memory, held to its sample."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tvm
import tvm_ffi

from bertile.loader import cpu_features
from bertile.schedules.cpu import SCHEDULES
from bertile.targets import rows

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

    def __init__(self, row: rows.Target) -> None:
        self.row = row
        self.target = rows.tvm_target(row)
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
        return self.call_all(library, operands, [np.zeros(shape, dtype)])[0]

    def call_all(self, library, operands, results) -> list[np.ndarray]:
        """As ``call``, for a kernel of several results, given as arrays of their form."""
        if self.lacks:
            pytest.skip(f"built, but not run: this CPU lacks {' '.join(self.lacks)}")
        tensors = [
            guarded(operand, np.nan if operand.dtype.kind == "f" else 0)[0] for operand in operands
        ]
        guarded_results = [
            guarded(np.full_like(result, UNTOUCHED), UNTOUCHED) for result in results
        ]
        buffers = [result for result, _ in guarded_results]
        library["main"](*map(tvm_ffi.from_dlpack, [*tensors, *buffers]))
        for result, memory in guarded_results:
            assert np.count_nonzero(memory == UNTOUCHED) == memory.size - result.size
        return buffers

    def difference(self, task, blocks=2, knobs=None, seed=0) -> float:
        """The largest absolute difference to the sample's expected result."""
        sample, buffers = self.run(task, blocks, knobs, seed)
        return float(np.abs(sample.decode(buffers) - sample.expected).max())

    def mistake(self, task, blocks=2, knobs=None, seed=0):
        """What the sample finds wrong with the kernel, None if nothing is."""
        sample, buffers = self.run(task, blocks, knobs, seed)
        return sample.mistake(buffers)

    def run(self, task, blocks=2, knobs=None, seed=0):
        """The sample of a task, and what the kernel makes of it."""
        schedule = SCHEDULES[task.operation]
        library = self.build(task, knobs)
        knobs = schedule.default(task, self.row) if knobs is None else knobs
        sample = schedule.sample(task, blocks, np.random.default_rng(seed))
        weights = schedule.pack(task, knobs, sample.weights, self.row)
        return sample, self.call_all(library, [*sample.activations, *weights], sample.buffers())

    def points(self, task, count, seed=0):
        """Random points of a task's space."""
        rng = np.random.default_rng(seed)
        space = SCHEDULES[task.operation].space(task, self.row)
        for _ in range(count):
            yield {knob: int(rng.choice(values)) for knob, values in space.items()}


@pytest.fixture(scope="session")
def kernels_of():
    """The kernels of a target row, by the row's name."""
    return cache(lambda name: Kernels(rows.resolve(name, threads=1)))


@pytest.fixture(scope="session", params=["x86-avx512", "x86-avx2"])
def kernels(request, kernels_of) -> Kernels:
    return kernels_of(request.param)
