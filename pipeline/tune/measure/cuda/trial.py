"""Runs one compiled candidate after another on an NVIDIA GPU, compares and times it.

Run as ``python -m bertile.tune.measure.cuda.trial`` in a process of its own; ``trial_server`` says
how. A time is one of a CUDA graph that calls the kernel again and again, by events around its
replays. Every call takes the next copy of the weights, so many that the L2 cache cannot hold them:
a model's layers find their weights in memory. Its activations it finds in the cache, where the
kernel before has left them, and so does a trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import BertileError, PlatformError
from bertile.cuda_loader import evaluate
from bertile.schedules import schedules_for, trial_sample
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task
from bertile.targets.rows import Target, resolve
from bertile.tune.measure.cuda.card import Call, Card, Memory
from bertile.tune.measure.trial_server import answer, serve

REPEATS = 3
REPEAT_MILLISECONDS = 10.0
CALLS = 16  # of one graph, at least: what lies between two replays is no kernel's time
MOST_REPLAYS = 200
COLD = 2  # times the L2 cache, in copies of the weights
MOST_COPIES = 128  # smaller weights are left in the cache: they are read in no time


def measure(
    operation: str,
    shape: dict[str, Any],
    knobs: dict[str, int],
    target: str,
    threads: int,
    blocks: int,
    also: Sequence[int] = (),
    image: str = "",
) -> dict[str, Any]:
    """Compare the kernel in the file ``image`` (cubin or PTX) with the reference and time it, on
    ``blocks`` blocks of tokens; ``also`` names others.
    """
    task, row, card = Task(operation, shape), resolve(target, threads), open_card()
    check(card, row)
    schedule = schedules_for(row)[operation]
    kernel = schedule.kernel(task, knobs, row)
    packed = schedule.pack(task, knobs, trial_sample(task, blocks, row).weights, row)
    code = Path(image).read_bytes()
    with card, card.memory() as memory, card.module(code) as module:
        copies = [[memory.upload(array) for array in packed] for _ in range(_copies(packed, card))]

        def times(sample: Sample) -> list[float] | str:
            return _times(card, module, kernel, sample, copies)

        outcome = answer(task, row, (blocks, *also), times)
    return {**outcome, "machine": {**card.facts(), "row": row.name}}


def answered(**request: Any) -> dict[str, Any]:
    """As :func:`measure`; where a kernel has failed, its error, and that this process is of no use
    any more.
    """
    try:
        return measure(**request)
    except BertileError as error:
        try:
            open_card().check()
        except BertileError:
            return {"error": error.what, "ended": True}
        raise


@lru_cache(maxsize=1)
def open_card() -> Card:
    """The first device, for the rest of this process."""
    return Card()


def check(card: Card, row: Target) -> None:
    """PlatformError where a device cannot run a row's code."""
    capability = card.facts()["capability"]
    if capability != row.gpu.capability:
        raise PlatformError(
            f"{card.name} is sm_{capability}, the kernels are for {row.name}",
            f"give --target cuda-sm{capability}",
        )


def _copies(packed: Sequence[np.ndarray], card: Card) -> int:
    """How often the weights are there."""
    size = sum(array.nbytes for array in packed)
    if size * MOST_COPIES < card.l2_bytes:
        return 1
    return min(MOST_COPIES, -(-COLD * card.l2_bytes // size))


def _times(
    card: Card, module: Any, kernel: Kernel, sample: Sample, copies: Sequence[Sequence[int]]
) -> list[float] | str:
    """Microseconds of each repeat, or what is wrong with the result."""
    symbols = dict(sample.symbols)
    with card.memory() as memory:
        activations = [memory.upload(array) for array in sample.activations]
        results = sample.buffers()
        places = [memory.empty(array.nbytes) for array in results]
        scratch = {
            name: memory.empty(evaluate(size, symbols)) for name, size in kernel.scratch.items()
        }

        def call(weights: Sequence[int]) -> Call:
            operands = zip(kernel.operands, (*activations, *weights, *places), strict=True)
            return kernel, {**scratch, **dict(operands)}, symbols

        with card.graph(module, [call(copies[0])]) as once:
            card.milliseconds(once)
        if mistake := sample.mistake(_read(memory, places, results)):
            return mistake
        count = max(CALLS, len(copies))
        calls = [call(copies[number % len(copies)]) for number in range(count)]
        with card.graph(module, calls) as graph:
            card.milliseconds(graph)
            first = max(card.milliseconds(graph), 1e-3)
            replays = max(1, min(MOST_REPLAYS, round(REPEAT_MILLISECONDS / first)))
            milliseconds = [card.milliseconds(graph, replays) for _ in range(REPEATS)]
        if mistake := sample.mistake(_read(memory, places, results)):
            return f"{mistake}, called again"
    return [1e3 * total / (replays * count) for total in milliseconds]


def _read(memory: Memory, places: Sequence[int], results: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [memory.download(place, like) for place, like in zip(places, results)]


if __name__ == "__main__":
    serve(answered)
