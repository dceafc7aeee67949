"""A bundle and other engines come in; the time from process start to the first result, and the
memory that the process holds then, go out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile import bench, loader
from bertile.engines import Arrays, Source, Worker
from bertile.progress import Progress
from bertile.tables import table


def startup(
    directory: Path,
    onnx: Path | None = None,
    *,
    against: Sequence[str] = ("onnxruntime",),
    length: int = 128,
    threads: int | None = None,
    repeat: int = 5,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Start a process per engine, one after the other, `repeat` times, for one sequence.

    "rows" has, per engine, the median milliseconds until its first result (Python, imports and
    loading included, files in the page cache) and the resident megabytes after it, of which the
    model's weights are "weights_mb" (10**6 bytes).
    """
    progress = progress or Progress(verbosity=-1)
    manifest = loader.read_manifest(directory)
    threads = loader.thread_count(threads)
    inputs = bench.random_inputs(manifest, 1, length)
    against, notes = bench.possible(against, manifest)
    source = bench.source(Path(directory), manifest, against, onnx, cache_dir)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bertile", *against)}
    for turn in range(repeat):
        progress.status(f"startup   {turn} of {repeat}")
        for name, results in found.items():
            results.append(_first_result(name, source, threads, inputs))
    weights = manifest["files"][loader.WEIGHTS]["bytes"] / 1e6
    medians = {name: np.median(np.array(results), axis=0) for name, results in found.items()}
    rows = [
        {
            "engine": name,
            "first_result_ms": float(median[0]),
            "ratio": float(medians["bertile"][0] / median[0]),
            "resident_mb": float(median[1]),
            "weights_mb": weights,
        }
        for name, median in medians.items()
    ]
    return {"rows": rows, "threads": threads, "length": length, "notes": notes}


def as_table(report: dict[str, Any]) -> str:
    """The rows for a terminal."""
    names = ("engine", "first_result_ms", "ratio", "resident_mb", "weights_mb")
    header = ("engine", "first result ms", "bertile / it", "resident MB", "weights MB")
    return table(header, [[row[name] for name in names] for row in report["rows"]])


def _first_result(name: str, source: Source, threads: int, inputs: Arrays) -> tuple[float, float]:
    began = time.perf_counter()
    worker = Worker(name, source, threads)
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
