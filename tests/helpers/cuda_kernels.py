"""CUDA kernels in the emulator, held to their samples; what their machine code takes of a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bertile.codegen.cuda import compiler, cubin
from bertile.run.cuda import emulator
from bertile.schedules.cuda import SCHEDULES
from bertile.targets import rows

ROWS = ("cuda-sm75", "cuda-sm80", "cuda-sm86", "cuda-sm89", "cuda-sm90")


def slow(*values):
    """Parameters that show what others show too: they need not be run every time."""
    return pytest.param(*values, marks=pytest.mark.slow)


def row_of(name):
    return rows.resolve(name, threads=1)


def run(task, sample, row="cuda-sm90", knobs=None, seed=0, entry=None):
    """What a kernel makes of a sample, by the entry that is for it or by that of a number; it must
    write all of its results.
    """
    schedule, row = SCHEDULES[task.operation], row_of(row)
    knobs = schedule.default(task, row) if knobs is None else knobs
    assert schedule.valid(task, row, knobs)
    packed = schedule.pack(task, knobs, sample.weights, row)
    results = sample.buffers()
    for result in results:
        result.reshape(-1).view("uint8")[...] = 0xFF  # NaN, or a byte that is not padding
    kernel = schedule.kernel(task, knobs, row)
    if entry is not None:
        kernel = replace(kernel, launches=(replace(kernel.launches[entry], when=1),))
    arrays = [*map(np.ascontiguousarray, sample.activations), *packed, *results]
    emulator.run_kernel(kernel, arrays, sample.symbols, seed=seed)
    return results


def mistake(task, row="cuda-sm90", knobs=None, blocks=3, sample=None):
    """What is wrong with a kernel's result, None if nothing is."""
    schedule = SCHEDULES[task.operation]
    sample = sample or schedule.sample(task, blocks, np.random.default_rng(0))
    return sample.mistake(run(task, sample, row, knobs))


def points(task, row, count, seed=0):
    """Random points of a task's space."""
    rng = np.random.default_rng(seed)
    space = SCHEDULES[task.operation].space(task, row_of(row))
    for _ in range(count):
        yield {knob: int(rng.choice(values)) for knob, values in space.items()}


def resources(task, row, knobs=None):
    """What the machine code of each of a kernel's launches takes, and the launch."""
    schedule, target = SCHEDULES[task.operation], row_of(row)
    kernel = schedule.kernel(task, knobs or schedule.default(task, target), target)
    program = compiler.prelude() + kernel.source
    taken = cubin.read(compiler.find().run(program, compiler.machine(target)))
    return [(taken[launch.entry], launch) for launch in kernel.launches]


def assert_fits(task, row, knobs=None):
    """Nothing is spilled, and registers and shared memory are there for one thread block; gives
    what each launch takes.
    """
    launches, gpu = resources(task, row, knobs), row_of(row).gpu
    for taken, launch in launches:
        assert taken.local == 0, launch.entry
        assert taken.registers * launch.threads <= gpu.registers_per_sm, launch.entry
        assert taken.shared + launch.shared <= gpu.shared_per_block, launch.entry
    return [taken for taken, _ in launches]
