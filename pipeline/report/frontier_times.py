"""Times engines in turns; of a bundle whose texts leave early each of its stages, since a text's
time is that of the stage at which it leaves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertile.base.progress import Progress
from bertile.bench import turns
from bertile.bench.engines import Arrays

Times = list[list[float]]  # of each stage, milliseconds of its calls; of most engines there is one


def measure(
    workers: Sequence[Any],
    inputs: Arrays,
    repeat: int,
    stages: Mapping[str, int],
    progress: Progress,
) -> dict[str, Times]:
    """`repeat` calls of each worker and stage, by the worker's name; `stages` counts them."""
    times: dict[str, Times] = {
        worker.name: [[] for _ in range(stages[worker.name])] for worker in workers
    }
    for turn, done in enumerate(range(0, repeat, turns.TURN)):
        progress.status(f"pareto    latency, call {done} of {repeat}")
        place = turn % len(workers)
        for worker in (*workers[place:], *workers[:place]):
            time.sleep(turns.PAUSE_SECONDS)
            for stage, milliseconds in enumerate(times[worker.name]):
                if len(times[worker.name]) > 1:
                    worker.apply(_leave_at, stage)
                milliseconds += worker.call(inputs, min(turns.TURN, repeat - done))
    for worker in workers:
        if len(times[worker.name]) > 1:
            worker.apply(_leave_at, None)
    return times


def of_texts(times: Times, left: np.ndarray) -> dict[str, float]:
    """ "median_ms" and "p90_ms" of texts, of which the share `left` (stages,) left at each stage.

    The first is the mean over the texts of the median of their stage.
    """
    medians = [float(np.median(milliseconds)) for milliseconds in times]
    every = np.concatenate(times)
    weights = np.repeat(left / [len(each) for each in times], [len(each) for each in times])
    order = np.argsort(every)
    place = np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum())
    return {"median_ms": float(np.dot(left, medians)), "p90_ms": float(every[order][place])}


def _leave_at(engine: Any, stage: int | None) -> None:
    engine.leave_at(stage)
