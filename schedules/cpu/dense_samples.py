"""Draws trial operands of the matrix product in each precision; multiplies them by numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic, lanes, precisions
from bertile.schedules.cpu.product import group_size
from bertile.schedules.cpu.rotary import sample_angles
from bertile.schedules.cpu.samples import result_sample
from bertile.schedules.outputs_that_meet import channels, is_gated, turned
from bertile.schedules.reference import (
    LEVELS,
    apply_activation,
    bounding_scale,
    gated,
    rotary_heads,
)
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
    inputs = len(w)
    x = rng.standard_normal((blocks * BLOCK_TOKENS, inputs)).astype("float32")
    trial = TRIALS[precisions.name(task)]
    size = [group_size(task)] if group_size(task) else []
    activations, weights, product = trial.operands(x, w, b, *size)
    finish = gated if is_gated(task) else apply_activation
    expected = finish(task.shape["activation"], product)
    if task.shape["residual"]:
        r = rng.standard_normal((blocks * BLOCK_TOKENS, channels(task))).astype("float32")
        activations.append(lanes.to_lanes(r))
        expected = expected + r
    heads, size = turned(task)
    if heads:
        angles = sample_angles(blocks, size)
        activations += map(lanes.to_lanes, angles)
        expected = rotary_heads(expected, *angles, heads)
    of_gelu = trial.of_gelu if task.shape["activation"] == "gelu" else 0.0
    tolerance = max(trial.tolerance, of_gelu)
    return result_sample(task, activations, weights, expected.astype("float32"), tolerance)


Operands = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]


def _floats(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> Operands:
    return [lanes.to_lanes(x)], [w, b], x.astype("float64") @ w + b


def _stored_halves(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> Operands:
    return [lanes.to_lanes(x)], [w, b], x.astype("float64") @ w.astype("float16") + b


def _bf16(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> Operands:
    x_, w_ = (arithmetic.bf16_values(arithmetic.bf16_pairs(_even(a))) for a in (x, w))
    x_, w_ = x_[:, : x.shape[1]], w_[:, : w.shape[1]]
    return [arithmetic.bf16_lanes(_even(x))], [w, b], x_.astype("float64") @ w_ + b


def _int8(x: np.ndarray, w: np.ndarray, b: np.ndarray, bounded: bool = False) -> Operands:
    q, scale = _quantized(w, bounded)
    activations, x_ = _bytes(x)
    shift = (q.astype("float64").sum(0) * scale).astype("float32")
    return activations, [q, scale, shift, b], x_ @ (q * scale.astype("float64")) + b


def _int4(x: np.ndarray, w: np.ndarray, b: np.ndarray, size: int) -> Operands:
    # whole multiples of a part of the largest: such scales lose nothing where groups are rescaled
    groups = -(-len(w) // size)
    whole = 8 + np.arange(groups * w.shape[1]).reshape(groups, -1) % 8
    whole[0] = 15
    base = np.exp2(np.floor(np.log2(np.abs(w).max(0).clip(1e-6) / 64)))
    scales = (whole * base).astype("float16")
    wide = scales.astype("float64").repeat(size, 0)[: len(w)]
    q = np.rint(w / wide).clip(-8, 7).astype("int8")
    activations, x_ = _bytes(x)
    shift = (q * wide).sum(0).astype("float32")
    return activations, [q, scales, shift, b], x_ @ (q * wide) + b


def _bytes(x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """x as a kernel reads it, a range a token, and what that stands for."""
    bytes_, scale, low = arithmetic.quantized_rows(x)
    values = low[:, None].astype("float64") + scale[:, None].astype("float64") * bytes_
    return [arithmetic.grouped(bytes_, 4), arithmetic.range_lanes(scale, low)], values


def _int8_static(x: np.ndarray, w: np.ndarray, b: np.ndarray, bounded: bool = False) -> Operands:
    q, scale = _quantized(w, bounded)
    low, step = -4.0, 8.0 / LEVELS
    bytes_ = np.rint(np.clip((x - low) / step, 0, LEVELS)).astype("uint8")
    folded = (low * (q.astype("float64") * scale).sum(0) + b).astype("float32")
    weights = [q, (scale * step).astype("float32"), folded]
    product = (low + step * bytes_.astype("float64")) @ (q * scale.astype("float64")) + b
    return [arithmetic.grouped(bytes_, 4)], weights, product


def _quantized(w: np.ndarray, bounded: bool) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(w).max(0)
    scale = np.where(largest > 0, largest, np.float32(1)) / 127
    if bounded:
        scale = np.maximum(scale, bounding_scale(w))
    return np.rint(w / scale).astype("int8"), scale


class Trial(NamedTuple):
    """A row: how a precision is tried. ``operands`` of x, w and b (and the size of a group) are
    activations and weights as the kernel reads them, and x w + b of what they stand for;
    ``tolerance`` is what the sums, and the activations as that precision computes them, may be off
    by, ``of_gelu`` where that is more.
    """

    operands: Callable[..., Operands]
    tolerance: float = 2e-4
    of_gelu: float = 0.0


TRIALS = {
    "fp32": Trial(_floats, 1e-4),
    "fp16": Trial(_stored_halves, 1e-4),
    "bf16": Trial(_bf16),
    "int8": Trial(_int8, of_gelu=6e-4),
    "int8_static": Trial(_int8_static, of_gelu=6e-4),
    "int8_bounded": Trial(partial(_int8, bounded=True), of_gelu=6e-4),
    "int8_bounded_static": Trial(partial(_int8_static, bounded=True), of_gelu=6e-4),
    "int4": Trial(_int4, of_gelu=6e-4),
}


def _even(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, x.shape[1] % 2)))
