"""Sums up a compile at its end: size, speed, difference to the reference, and which kernels are
tuned.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bertile import backends, loader
from bertile.base.progress import Progress
from bertile.run import requests
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import ORIGINS


def count(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """How many kernels have which provenance."""
    kinds = [kernel["provenance"] for kernel in kernels]
    counts = {kind: kinds.count(kind) for kind in (*ORIGINS, "nearest", "default", "generic")}
    return {kind: count for kind, count in counts.items() if count or kind not in ORIGINS[1:]}


def describe(path: Path, row: Target, progress: Progress) -> dict[str, Any]:
    """What stands in the table; the time of a request is measured here, where that can be."""
    from bertile.verify import verifier

    manifest = loader.read_manifest(path)
    length = requests.usual_length(manifest)
    executed = manifest["check"].get("executed", True)
    runs_here = executed and backends.of(row).runs_here(row, manifest["check"])
    return {
        "output": str(path),
        "size_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "milliseconds": _milliseconds(path, length, row.threads) if runs_here else None,
        "length": length,
        "threads": row.threads,
        "gpu": manifest["check"].get("gpu"),
        "max_abs_difference": manifest["check"]["max_abs_difference"],
        "check": verifier.as_text(manifest["check"]),
        "kernels": count(manifest["kernels"]),
        "stages": progress.summary(),
    }


def _milliseconds(path: Path, length: int, threads: int) -> float:
    """The median time of one request of that many tokens."""
    with loader.load(path, threads, verify=False) as model:
        ids = np.ones((1, length), np.int64)
        times = []
        while len(times) < 5 or (sum(times) < 1.0 and len(times) < 30):
            began = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3
