"""Lists what each kernel of a bundle takes of the GPU; times a request where the GPU is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertile import loader
from bertile.base.errors import PlatformError
from bertile.run.requests import random_inputs, usual_length
from bertile.targets import detect

_NOT_ASKED = {"total_ms": None, "gpu": None, "reason": "they were not asked for"}


def inspect(
    directory: Path, batch: int, length: int | None = None, measure: bool = True
) -> dict[str, Any]:
    """A row for each entry of each kernel: "kernel", "origin", "calls", "registers" and "local"
    (bytes; spilled registers are among them) of a thread, static "shared" bytes of a block,
    "tensor" (instructions of tensor cores in its code). "total_ms" is None without a GPU.
    """
    manifest = loader.read_manifest(directory)
    kernels = [
        {"kernel": entry, "origin": kernel["provenance"], "calls": kernel["calls"], **takes}
        for kernel in manifest["kernels"]
        for entry, takes in kernel["entries"].items()
    ]
    length = length or usual_length(manifest)
    timed = _timed(directory, random_inputs(manifest, batch, length)) if measure else _NOT_ASKED
    fallen = manifest["fallthrough"]
    return {"kernels": kernels, "fallthrough": fallen, "batch": batch, "length": length, **timed}


def _timed(directory: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    if isinstance(card := detect.gpu(), str):
        return {"total_ms": None, "gpu": None, "reason": card}
    try:
        with loader.load(directory) as model:
            times = model.time(**inputs)
            return {"total_ms": float(np.median(times)), "gpu": model.gpu.name}
    except PlatformError as error:
        return {"total_ms": None, "gpu": None, "reason": error.what}


def summary(report: dict[str, Any]) -> str:
    """The line below the table."""
    if report["total_ms"] is None:
        return f"times are not measured: {report['reason']}"
    tokens = f"{report['batch']} x {report['length']} tokens"
    return f"{tokens}: {report['total_ms']:.3f} ms on {report['gpu']}, without copies"
