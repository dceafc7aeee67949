"""Draws trial operands of the matrix product in each precision; multiplies them by numpy."""

from __future__ import annotations

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.cpu.samples import result_sample
from bertile.schedules.reference import LEVELS, apply_activation
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Random operands, scaled as in a trained network, and the product by numpy in float64."""
    return product_sample(task, blocks, rng, *random_weights(task, rng))


def random_weights(task: Task, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """w (K, N) and b (N), scaled as in a trained network."""
    inputs, outputs = task.shape["inputs"], task.shape["outputs"]
    w = (rng.standard_normal((inputs, outputs)) * inputs**-0.5).astype("float32")
    return w, rng.standard_normal(outputs).astype("float32")


def product_sample(
    task: Task, blocks: int, rng: np.random.Generator, w: np.ndarray, b: np.ndarray
) -> Sample:
    """Random activations for these weights, and the product by numpy in float64."""
    inputs, outputs = w.shape
    x = rng.standard_normal((blocks * BLOCK_TOKENS, inputs)).astype("float32")
    activations, weights, product = _operands(task, x, w, b)
    expected = apply_activation(task.shape["activation"], product)
    if task.shape["residual"]:
        r = rng.standard_normal((blocks * BLOCK_TOKENS, outputs)).astype("float32")
        activations.append(lanes.to_lanes(r))
        expected = expected + r
    return result_sample(task, activations, weights, expected.astype("float32"), _tolerance(task))


def _tolerance(task: Task) -> float:
    """What the sums, and the activation as that precision computes it, may be off by."""
    precision = str(task.shape.get("precision", "fp32"))
    if precision.startswith("int8") and task.shape["activation"] == "gelu":
        return 6e-4
    return 1e-4 if precision in ("fp32", "fp16") else 2e-4


def _operands(
    task: Task, x: np.ndarray, w: np.ndarray, b: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Activations and weights as the kernel reads them, and x w + b of what they stand for."""
    precision = task.shape.get("precision", "fp32")
    if precision == "fp32":
        return [lanes.to_lanes(x)], [w, b], x.astype("float64") @ w + b
    if precision == "fp16":
        return [lanes.to_lanes(x)], [w, b], x.astype("float64") @ w.astype("float16") + b
    if precision == "bf16":
        x_, w_ = (arithmetic.bf16_values(arithmetic.bf16_pairs(_even(a))) for a in (x, w))
        x_, w_ = x_[:, : x.shape[1]], w_[:, : w.shape[1]]
        return [arithmetic.bf16_lanes(_even(x))], [w, b], x_.astype("float64") @ w_ + b
    largest = np.abs(w).max(0)
    scale = np.where(largest > 0, largest, np.float32(1)) / 127
    q = np.rint(w / scale).astype("int8")
    if precision == "int8":
        bytes_, x_scale, low = arithmetic.quantized_rows(x)
        ranges = [arithmetic.range_lanes(x_scale, low)]
        x_ = low[:, None].astype("float64") + x_scale[:, None].astype("float64") * bytes_
        vectors = [scale, (q.astype("float64").sum(0) * scale).astype("float32"), b]
    else:
        low, x_scale, ranges = -4.0, 8.0 / LEVELS, []
        bytes_ = np.rint(np.clip((x - low) / x_scale, 0, LEVELS)).astype("uint8")
        x_ = low + x_scale * bytes_.astype("float64")
        folded = low * (q.astype("float64") * scale).sum(0) + b
        vectors = [(scale * x_scale).astype("float32"), folded.astype("float32")]
    product = x_ @ (q * scale.astype("float64")) + b
    return [arithmetic.grouped(bytes_, 4), *ranges], [q, *vectors], product


def _even(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, x.shape[1] % 2)))
