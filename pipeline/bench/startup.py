"""Engines come in; the time from process start to the first result, and the memory that the process
holds then, go out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.progress import Progress
from bertile.bench.engines import Arrays, Engine
from bertile.bench.workers import start

REPEAT = 5


def startup(
    engines: Sequence[Engine],
    inputs: Arrays,
    weight_bytes: int,
    threads: int,
    cache_dir: str | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Start a process per engine, one after the other, `REPEAT` times, for one call on `inputs`.

    Gives a row per engine: the median milliseconds until its first result (Python, imports and
    loading included, files in the page cache) and the resident megabytes after it (10**6 bytes);
    "weights_mb" is what Bertile's weights take of that. The first engine is Bertile.
    """
    results_of: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for turn in range(REPEAT):
        progress.status(f"startup   {turn} of {REPEAT}")
        for engine in engines:
            results_of[engine.name].append(_first_result(engine, inputs, threads, cache_dir))
    medians = {name: np.median(np.array(results), axis=0) for name, results in results_of.items()}
    ours = medians[engines[0].name]
    return [
        {
            "engine": engine.name,
            "precision": engine.precision,
            "first_result_ms": float(medians[engine.name][0]),
            "ratio": float(ours[0] / medians[engine.name][0]),
            "resident_mb": float(medians[engine.name][1]),
            "weights_mb": weight_bytes / 1e6,
        }
        for engine in engines
    ]


def _first_result(
    engine: Engine, inputs: Arrays, threads: int, cache_dir: str | None
) -> tuple[float, float]:
    began = time.perf_counter()
    worker = start(engine, threads, cache_dir)
    try:
        worker.receive()  # ready
        worker.outputs(inputs)
        return (time.perf_counter() - began) * 1e3, _resident_mb(worker.pid)
    finally:
        worker.close()


def _resident_mb(pid: int) -> float:
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6
