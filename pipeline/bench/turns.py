"""Times the calls of engines in turns, and compares what they answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bertile.base.errors import MissingExtraError
from bertile.base.progress import Progress
from bertile.bench import sameness
from bertile.bench.engines import Arrays, Engine, LeftOut
from bertile.bench.sameness import Outputs
from bertile.bench.workers import start
from bertile.numerics.precision import PRECISIONS

# Calls that one engine makes before it is the next one's turn: few enough that all see the same
# weather on a shared machine.
TURN = 5
# Threads of the engine before still spin for a while; nobody starts beside them.
PAUSE_SECONDS = 0.05


@contextlib.contextmanager
def started(
    engines: Sequence[Engine], inputs: Arrays, threads: int, cache_dir: str | None
) -> Iterator[tuple[list[Any], dict[str, str], list[str]]]:
    """The engines' workers, each of which has run once, their versions by name, and a sentence on
    each engine that cannot run.
    """
    workers: list[Any] = []
    notes = []
    try:
        for engine in engines:
            try:
                workers.append(start(engine, threads, cache_dir))
            except LeftOut as reason:
                notes.append(str(reason))
        versions = {}
        for worker in list(workers):
            try:
                version = worker.receive()
                worker.outputs(inputs)
                versions[worker.name] = version
            except (LeftOut, MissingExtraError) as reason:
                left_out = f"{worker.name} is left out: "
                notes.append(f"{left_out}{str(reason).removeprefix(left_out)}")
                workers.remove(worker)
                worker.close()
        yield workers, versions, notes
    finally:
        for worker in workers:
            worker.close()


def measure(
    workers: Sequence[Any],
    inputs: Arrays,
    repeat: int,
    progress: Progress,
    reference: Outputs | None = None,
) -> list[dict[str, Any]]:
    """A row per worker; the first is Bertile, whose outputs are the reference if there is none."""
    batch, length = next(iter(inputs.values())).shape
    outputs = {worker.name: worker.outputs(inputs) for worker in workers}
    reference = reference or outputs[workers[0].name]
    times: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn, done in enumerate(range(0, repeat, TURN)):
        progress.status(f"bench     {batch} x {length} tokens, call {done} of {repeat}")
        first = turn % len(workers)  # so that nobody always works behind the same engine
        for worker in (*workers[first:], *workers[:first]):
            time.sleep(PAUSE_SECONDS)
            times[worker.name] += worker.call(inputs, min(TURN, repeat - done))
    medians = {name: float(np.median(milliseconds)) for name, milliseconds in times.items()}
    ours = medians[workers[0].name]
    rows = [
        {
            "engine": worker.name,
            "precision": worker.engine.precision,
            "batch": batch,
            "length": length,
            "median_ms": medians[worker.name],
            "p90_ms": float(np.quantile(times[worker.name], 0.9)),
            "p99_ms": float(np.quantile(times[worker.name], 0.99)),
            "ratio": ours / medians[worker.name],
            "best_ratio": None,
            **sameness.compared(reference, outputs[worker.name], inputs),
        }
        for worker in workers
    ]
    # who has computed another model is no rival
    others = [
        row["median_ms"]
        for row, worker in zip(rows[1:], workers[1:])
        if _rivals(workers[0].engine, worker.engine) and sameness.doubt(row) is None
    ]
    return [{**rows[0], "best_ratio": ours / min(others) if others else None}, *rows[1:]]


def _rivals(ours: Engine, theirs: Engine) -> bool:
    """Another library in the same arithmetic."""
    same = theirs.precision in (ours.precision, PRECISIONS[ours.precision].peer)
    return theirs.kind != "bertile" and same
