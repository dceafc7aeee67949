"""Builds candidates here and times them on a device of a tracker: ``trial`` over TVM's RPC.

Run as ``python -m bertile.tune.measure.remote_trial HOST:PORT KEY`` in a process of its own, as
many of them as there are devices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from bertile.base import scratch
from bertile.codegen.llvm import export_kernel
from bertile.schedules import trial_sample
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task
from bertile.targets.rows import Target, resolve
from bertile.tune.measure.device import session
from bertile.tune.measure.trial_server import answer, serve

REPEATS = 5
SESSION_SECONDS = 60.0  # of one trial, after which the device ends it
_NAME = "kernel.so"


class Remote:
    """Measures on whichever device of a key is free."""

    def __init__(self, tracker: str, key: str) -> None:
        self._tracker, self._key = tracker, key

    def measure(
        self,
        operation: str,
        shape: dict[str, Any],
        knobs: dict[str, int],
        target: str,
        threads: int,
        blocks: int,
        also: Sequence[int] = (),
    ) -> dict[str, Any]:
        """What ``trial.measure`` says, of a device; and "machine", which it was."""
        task, row = Task(operation, shape), resolve(target, threads)
        with scratch.directory("rpc-") as directory:
            library = Path(directory) / _NAME
            export_kernel(SCHEDULES[operation].kernel(task, knobs, row), row, library)
            board = session(self._tracker, self._key, SESSION_SECONDS, library)
        facts = _checked(board, row)
        kernel = board.load_module(_NAME)
        weights = trial_sample(task, blocks, row).weights
        packed = SCHEDULES[operation].pack(task, knobs, weights, row)
        uploaded = _uploaded(packed, board.cpu(0))

        def times(sample: Sample) -> list[float] | str:
            return _times(board, kernel, sample, uploaded)

        return {**answer(task, row, (blocks, *also), times), "machine": facts}


def _checked(board: Any, row: Target) -> dict[str, Any]:
    """What the device is; ValueError where it cannot run the row's code on so many threads."""
    facts = json.loads(board.get_function("bertile.facts")())
    features, threads = facts.pop("features"), facts.pop("threads")
    lacks = [feature for feature in row.features if feature not in features]
    if lacks:
        raise ValueError(f"the device lacks {' '.join(lacks)}, which {row.name} needs")
    if threads < row.threads:
        raise ValueError(f"the device serves {threads} threads: tune with --threads {threads}")
    board.get_function("bertile.threads")(row.threads)
    return {**facts, "row": row.name}


def _uploaded(arrays: Sequence[np.ndarray], device: Any) -> list[Any]:
    return [tvm.runtime.tensor(np.ascontiguousarray(array), device) for array in arrays]


def _times(board: Any, kernel: Any, sample: Sample, weights: Sequence[Any]) -> list[float] | str:
    """Microseconds of each repeat, from cold caches; or what is wrong with the result."""
    device = board.cpu(0)
    results = [tvm.runtime.tensor(array, device) for array in sample.buffers()]
    arguments = [*_uploaded(sample.activations, device), *weights, *results]
    kernel["kernel"](*arguments)
    if mistake := sample.mistake([result.numpy() for result in results]):
        return mistake
    timer = kernel.time_evaluator(
        "kernel", device, number=1, repeat=REPEATS, f_preproc="bertile.cold"
    )
    return [seconds * 1e6 for seconds in timer(*arguments).results]


if __name__ == "__main__":
    serve(Remote(*sys.argv[1:]).measure)
