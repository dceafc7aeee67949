"""Builds and times one choice of knobs after another: requests as JSON lines in, results as JSON
lines out.

Run as ``python -m bertile.trial`` in a process of its own, so that a candidate that crashes or
hangs costs only
its own trial. A result is either {"microseconds": [one per repeat]} or {"error": "what happened"}.
"""

from __future__ import annotations

import json
import sys
import time
from functools import lru_cache
from typing import Any

import numpy as np
import tvm

from bertile.loader import set_thread_defaults
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task
from bertile.targets import Target, resolve, tvm_target

REPEATS = 3
REPEAT_SECONDS = 0.02
# In a model the weights of a layer come from memory, not from a cache that the trial before has
# filled:
# every call takes the next of so many copies that no cache holds them all.
COLD_BYTES = 64 << 20
TOLERANCE = 1e-4  # relative to the largest magnitude of the expected result (at least 1)


def main() -> None:
    """Serve requests until the input ends."""
    set_thread_defaults()
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        try:
            answer = measure(**json.loads(line))
        except Exception as error:  # every failure of a candidate is its result
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[-300:]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def measure(
    operation: str,
    shape: dict[str, Any],
    knobs: dict[str, int],
    target: str,
    threads: int,
    blocks: int,
) -> dict[str, Any]:
    """Build the kernel, compare it with the reference, time it on ``blocks`` blocks of tokens."""
    task, row = Task(operation, shape), resolve(target, threads)
    run = build(task, knobs, row)
    arguments, result, expected = _arguments(task, knobs, blocks)
    run(*arguments[0], result)
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(result.numpy() - expected).max())
    if not difference <= TOLERANCE * scale:
        return {"error": f"wrong result: off by {difference:.2g} of {scale:.2g}"}
    return {"microseconds": [_repeat(run, arguments, result) for _ in range(REPEATS)]}


def build(task: Task, knobs: dict[str, int], row: Target) -> Any:
    """The compiled kernel of a task, as a function of its arguments."""
    func = SCHEDULES[task.operation].kernel(task, knobs, row).with_attr("global_symbol", "kernel")
    return tvm.tirx.build(tvm.IRModule({"kernel": func}), target=tvm_target(row))["kernel"]


def _arguments(
    task: Task, knobs: dict[str, int], blocks: int
) -> tuple[list[list[Any]], Any, np.ndarray]:
    """Argument lists that differ in where their weights lie, a result to write to, the expected
    one.
    """
    sample = _sample(task, blocks)
    packed = SCHEDULES[task.operation].pack(task, knobs, sample.weights)
    size = sum(array.nbytes for array in packed)
    copies = min(32, -(-COLD_BYTES // size)) if size else 1
    activations = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in sample.activations]
    lists = [[*activations, *(tvm.runtime.tensor(p) for p in packed)] for _ in range(copies)]
    result = tvm.runtime.tensor(np.zeros_like(sample.expected))
    return lists, result, sample.expected


@lru_cache(maxsize=2)
def _sample(task: Task, blocks: int) -> Sample:
    return SCHEDULES[task.operation].sample(task, blocks, np.random.default_rng(0))


def _repeat(run: Any, arguments: list[list[Any]], result: Any) -> float:
    """Median microseconds of the calls of one repeat."""
    times: list[float] = []
    while sum(times) < REPEAT_SECONDS or len(times) < 3:
        operands = arguments[len(times) % len(arguments)]
        began = time.perf_counter()
        run(*operands, result)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    main()
