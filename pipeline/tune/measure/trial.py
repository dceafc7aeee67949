"""Builds and times one choice of knobs after another on this machine's processor.

Run as ``python -m bertile.tune.measure.trial`` in a process of its own; ``trial_server`` says how.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from bertile.base.tvm_alone import tvm
from bertile.codegen.llvm import build_kernel
from bertile.schedules import trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.cpu.peak import peak_gflops
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task
from bertile.targets.rows import Target, resolve, tvm_target
from bertile.tune.measure.trial_server import answer, serve

REPEATS = 3
REPEAT_SECONDS = 0.01
REPEAT_CALLS = 1  # at least
# In a model the weights of a layer come from memory, not from a cache that the trial before has
# filled: every call takes the next of so many copies that no cache holds them all.
COLD_BYTES = 64 << 20
ALIGNMENT = 64  # of every tensor that a kernel reads


def measure(
    operation: str,
    shape: dict[str, Any],
    knobs: dict[str, int],
    target: str,
    threads: int,
    blocks: int,
    also: Sequence[int] = (),
) -> dict[str, Any]:
    """Build the kernel, compare it with the reference and time it, on ``blocks`` blocks of tokens.

    ``also`` names other numbers of blocks: their times come as {"also": {tokens: microseconds}}.
    """
    task, row = Task(operation, shape), resolve(target, threads)
    _warm_up(row)
    run = build(task, knobs, row)
    weights = trial_sample(task, blocks, row).weights
    cold = copies(SCHEDULES[operation].pack(task, knobs, weights, row))
    return answer(task, row, (blocks, *also), lambda sample: _checked_times(run, sample, cold))


@lru_cache(maxsize=1)
def _warm_up(row: Target) -> None:
    """Without it the first trial of a process ran on one of two threads, at half the speed."""
    peak_gflops(tvm_target(row), row, row.threads)


def build(task: Task, knobs: dict[str, int], row: Target) -> Any:
    """The compiled kernel of a task, as a function of its arguments."""
    return build_kernel(SCHEDULES[task.operation].kernel(task, knobs, row), row)


def copies(packed: Sequence[np.ndarray]) -> list[list[Any]]:
    """The weights as often as no cache can hold them, in memory that trials share: to have the
    system clear it anew would take longer than the copying.
    """
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in packed]
    count = min(32, -(-COLD_BYTES // sum(sizes))) if packed else 1
    memory = _memory(count * sum(sizes))
    copies, at = [], 0
    for _ in range(count):
        copies.append([])
        for array, size in zip(packed, sizes):
            view = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(view, array)
            copies[-1].append(tvm.runtime.from_dlpack(view))
            at += size
    return copies


_shared = np.empty(0, np.uint8)


def _memory(size: int) -> np.ndarray:
    """So many bytes from an aligned address."""
    global _shared
    if _shared.size < size + ALIGNMENT:
        _shared = np.empty(size + ALIGNMENT, np.uint8)
    start = -_shared.ctypes.data % ALIGNMENT
    return _shared[start : start + size]


def _checked_times(run: Any, sample: Sample, cold: list[list[Any]]) -> list[float] | str:
    """Microseconds of each repeat, or what is wrong with the result."""
    activations = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in sample.activations]
    arguments = [[*activations, *weights] for weights in cold]
    results = [tvm.runtime.tensor(array) for array in sample.buffers()]
    run(*arguments[0], *results)
    if mistake := sample.mistake([result.numpy() for result in results]):
        return mistake
    return [repeat(run, arguments, results) for _ in range(REPEATS)]


def repeat(run: Any, arguments: list[list[Any]], results: list[Any]) -> float:
    """Median microseconds of the calls of one repeat."""
    times: list[float] = []
    while sum(times) < REPEAT_SECONDS or len(times) < REPEAT_CALLS:
        operands = arguments[len(times) % len(arguments)]
        began = time.perf_counter()
        run(*operands, *results)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    serve(measure)
