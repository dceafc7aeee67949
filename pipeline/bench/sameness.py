"""Tells whether engines have computed the same model, by their outputs and float32's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertile.bench.engines import Arrays, Engine
from bertile.bench.workers import Worker
from bertile.numerics.precision import PRECISIONS

Outputs = list[np.ndarray]

# Float32 outputs are near each value too: a cosine does not see a factor.
SAME_FP32 = 1e-2
APART = "{engine}'s outputs differ from float32's by {max_abs_difference:.2g}: not the same model"
DIFFERS = "{engine}'s outputs have a cosine of {cosine:.4f} to float32's: not the same model"


def references(
    engines: Sequence[Engine], inputs: Sequence[Arrays], threads: int
) -> list[Outputs | None]:
    """Float32's outputs for each of the inputs, where not all engines compute in it and there is an
    ONNX file.
    """
    if engines[0].source.onnx is None or all(engine.precision == "fp32" for engine in engines):
        return [None] * len(inputs)
    return [*float_outputs(engines[0], inputs, threads)]


def float_outputs(engine: Engine, inputs: Sequence[Arrays], threads: int) -> list[Outputs]:
    """What ONNX Runtime gives in float32 for each of the inputs."""
    worker = Worker(Engine("ONNX Runtime", "onnxruntime", "fp32", engine.source), threads)
    try:
        worker.receive()
        return [worker.outputs(arrays) for arrays in inputs]
    finally:
        worker.close()


def compared(reference: Outputs, outputs: Outputs, inputs: Arrays) -> dict[str, float]:
    """The mean "cosine" over vectors and the "max_abs_difference", of tokens, not of padding."""
    mask = inputs.get("attention_mask")
    ours, theirs = real_tokens(reference, mask), real_tokens(outputs, mask)
    return {"cosine": cosine(ours, theirs), "max_abs_difference": _difference(ours, theirs)}


def real_tokens(outputs: Outputs, mask: np.ndarray | None) -> Outputs:
    """The outputs without the vectors of padding, which no engine owes anybody."""
    if mask is None or mask.all():
        return outputs
    real = mask.astype(bool)
    return [array[real] if array.shape[:2] == real.shape else array for array in outputs]


def doubt(row: dict[str, Any]) -> str | None:
    """Why an engine cannot have computed the same model, None where it may have."""
    if not row["cosine"] >= least_cosine(row["precision"]):
        return DIFFERS.format(**row)
    if row["precision"] == "fp32" and not row["max_abs_difference"] <= SAME_FP32:
        return APART.format(**row)
    return None


def least_cosine(precision: str) -> float:
    """What a precision's rounding explains; of one that only peers have, what our coarsest does."""
    if precision in PRECISIONS:
        return PRECISIONS[precision].cosine
    return min(row.cosine for row in PRECISIONS.values())


def cosine(ours: Outputs, theirs: Outputs) -> float:
    """The mean over all vectors along the last axis, of all outputs."""
    cosines = []
    for pair in zip(ours, theirs, strict=True):
        a, b = (output.reshape(-1, output.shape[-1]).astype(np.float64) for output in pair)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append((a * b).sum(axis=1) / np.maximum(lengths, 1e-30))
    return float(np.concatenate(cosines).mean())


def _difference(ours: Outputs, theirs: Outputs) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
