"""Draws padded random batches, and compares two forms of one model on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertile.base.errors import ModelError, require
from bertile.loader import SIDES
from bertile.onnx.exported import InputSpec


def sample(
    inputs: Iterable[InputSpec], batch: int, length: int, padding_id: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random arrays for `inputs`; row 0 is full, the others are padded on the right.

    Ids are below 1000 where the vocabulary allows and avoid `padding_id` at real tokens, which
    RoBERTa takes its positions from; one that the model does not have is 0.
    """
    random = np.random.default_rng(seed)
    real = np.maximum(1, random.integers(1, length + 1, size=batch))
    real[0] = length
    mask = (np.arange(length) < real[:, None]).astype(np.int64)
    arrays = {}
    for spec in inputs:
        if spec.name == "attention_mask":
            values = mask
        else:
            values = random.integers(0, min(spec.below or 1000, 1000), size=(batch, length))
        if spec.name == "input_ids":
            padding_id = padding_id if 0 <= padding_id < (spec.below or padding_id + 1) else 0
            last = padding_id + 1 == spec.below
            values = np.where(values == padding_id, padding_id + (-1 if last else 1), values)
            values = np.where(mask == 1, values, padding_id)
        arrays[spec.name] = values.astype(spec.dtype)
    for first, last in (SIDES[::2], SIDES[1::2]):
        if first in arrays and last in arrays:  # no box ends before it begins
            arrays[last] = np.maximum(arrays[first], arrays[last])
    return arrays


def run_onnx(path: Path | bytes, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run one batch through ONNX Runtime and return its outputs by name."""
    runner = session(path)
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(names, dict(arrays))))


def session(path: Path | bytes, optimize: bool = True) -> Any:
    """Open a model, a file or its bytes, in ONNX Runtime on the CPU; ModelError if it cannot."""
    (runtime,) = require("compile", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    # a thread that waits for the next operator leaves its core to others meanwhile
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = path if isinstance(path, bytes) else str(path)
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its errors
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"ONNX Runtime cannot load the model: {reason}") from error


def largest_difference(
    got: np.ndarray, want: np.ndarray, mask: np.ndarray, axes: Sequence[Any] | None = None
) -> float:
    """Return the largest absolute difference, at real tokens alone if the output is per token.

    An output is per token when it has an axis called "batch" and one called "length", and where
    its `axes` are not known, when its first two are those of `mask`; infinity for other shapes or
    values that are not finite.
    """
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    got, want = _real(got, mask, axes), _real(want, mask, axes)
    return float(np.abs(got - want).max(initial=0.0))


def cosine(
    got: np.ndarray, want: np.ndarray, mask: np.ndarray, axes: Sequence[Any] | None = None
) -> float:
    """Return the cosine between two outputs, each as one vector of its real tokens' values.

    0 for other shapes and values that are not finite, 1 where both are zero throughout.
    """
    if got.shape != want.shape or not np.isfinite(got).all():
        return 0.0
    got, want = (_real(values, mask, axes).reshape(-1) for values in (got, want))
    if not got.any() and not want.any():
        return 1.0
    norms = float(np.linalg.norm(got) * np.linalg.norm(want))
    return float(got @ want) / norms if norms else 0.0


def squared_norms(got: np.ndarray, want: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Return the squared norms of the difference and of `want`, of the same elements."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf"), 0.0
    got, want = _real(got, mask), _real(want, mask)
    return float(np.square(got - want).sum()), float(np.square(want).sum())


def _real(values: np.ndarray, mask: np.ndarray, axes: Sequence[Any] | None = None) -> np.ndarray:
    values = values.astype(np.float64)
    if axes is None:
        per_token = values.ndim >= 2 and values.shape[:2] == mask.shape
        axes = ("batch", "length") if per_token else ()
    if "batch" not in axes or "length" not in axes:
        return values
    return np.moveaxis(values, (axes.index("batch"), axes.index("length")), (0, 1))[mask != 0]
