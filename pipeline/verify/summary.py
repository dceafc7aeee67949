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
from bertile.families import table
from bertile.loading.exits import leaving_at
from bertile.onnx.exported import UNKNOWN
from bertile.run import requests
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import ELSEWHERE, ORIGINS

GENERIC = "generic"  # the provenance of what TVM compiles by its own schedules


def count(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """How many kernels have which provenance."""
    kinds = [kernel["provenance"] for kernel in kernels]
    counts = {kind: kinds.count(kind) for kind in (*ORIGINS, "nearest", "default", GENERIC)}
    return {kind: count for kind, count in counts.items() if count or kind not in ORIGINS[1:]}


# What a kernel's provenance is called in a sentence, of one and of several.
_WORDS = {
    "tuned": ("tuned", "tuned"),
    ELSEWHERE: ("tuned on another processor", "tuned on another processor"),
    "estimated": ("chosen by estimate", "chosen by estimate"),
    "nearest": ("with settings of a similar shape", "with settings of similar shapes"),
    "default": ("default", "defaults"),
}


def in_words(kernels: list[dict[str, Any]]) -> str:
    """The same in a sentence, which says too on what processors the records were measured."""
    counts = count(kernels)
    parts = [
        f"{number} {_WORDS[kind][number != 1]}{_machines(kernels, kind)}"
        for kind, number in counts.items()
        if number and kind != GENERIC
    ]
    ours = sum(number for kind, number in counts.items() if kind != GENERIC)
    origins = f" ({', '.join(parts)})" if parts else ""
    return f"{ours} kernel{'s' * (ours != 1)} of Bertile{origins}, {counts[GENERIC]} of TVM"


def _machines(kernels: list[dict[str, Any]], kind: str) -> str:
    """On which processors the records of that kind were measured; "" where none is known."""
    machines = {
        kernel["record"]["measured_on"]
        for kernel in kernels
        if kernel["provenance"] == kind and kernel.get("record", {}).get("measured_on")
    }
    join = ": " if kind == ELSEWHERE else " on "
    return f"{join}{' and '.join(sorted(machines))}" if machines and kind in ORIGINS[:2] else ""


def road(manifest: dict[str, Any]) -> str | None:
    """What is said of a checkpoint whose family has no row, with the operators that fell through to
    TVM's kernels; None for any other model.
    """
    family = manifest["model"]["family"]
    if family == UNKNOWN or table.named(family).own:
        return None
    names = [name.partition(" ")[0].removeprefix("relax.") for name in manifest["fallthrough"]]
    counted = [f"{name} {names.count(name)} times" for name in sorted(set(names))]
    counted = [text.removesuffix(" 1 times") for text in counted]
    rest = f"TVM's kernels compute {', '.join(counted)}" if counted else "nothing fell through"
    return f"{family} has no row of its own: compiled through its ONNX form; {rest}"


def describe(path: Path, row: Target, progress: Progress) -> dict[str, Any]:
    """What stands in the table; the time of a request is measured here, where that can be."""
    from bertile.verify import verifier

    manifest = loader.read_manifest(path)
    length = requests.usual_length(manifest)
    executed = manifest["check"].get("executed", True)
    runs_here = executed and backends.of(row).runs_here(row, manifest["check"])
    exits = manifest.get("exits")
    times = _milliseconds(path, length, row.threads, exits) if runs_here else []
    return {
        "output": str(path),
        "size_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "milliseconds": times[-1] if times else None,
        **({"exits": dict(zip(exits["layers"], times))} if exits and times else {}),
        "length": length,
        "threads": row.threads,
        "gpu": manifest["check"].get("gpu"),
        "max_abs_difference": manifest["check"]["max_abs_difference"],
        "check": verifier.as_text(manifest["check"]),
        "kernels": count(manifest["kernels"]),
        "kernels_in_words": in_words(manifest["kernels"]),
        "road": road(manifest),
        "stages": progress.summary(),
    }


def _milliseconds(
    path: Path, length: int, threads: int, exits: dict[str, Any] | None
) -> list[float]:
    """The median time of one request of that many tokens; of a model with early heads that up to
    each of them, and to the end.
    """
    with loader.load(path, threads, verify=False) as model:
        inputs = requests.random_inputs(model.manifest, 1, length)
        if exits is None:
            return [_median(model, inputs)]
        medians = []
        for stage in range(len(exits["stages"])):
            model.exit_thresholds = leaving_at(stage, exits)
            medians.append(_median(model, inputs))
    return medians


def _median(model: Any, inputs: dict[str, Any]) -> float:
    times = []
    while len(times) < 5 or (sum(times) < 1.0 and len(times) < 30):
        began = time.perf_counter()
        model(**inputs)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3
