"""Does the arithmetic of bytes in numpy: kernels are compared with it, and reports made of it.

Weights: symmetric per output channel, s8. Inputs: asymmetric, u8, per token or one range for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bertile.numerics.four_bit import quantize_groups
from bertile.numerics.precision import LayerPlan
from bertile.schedules.reference import BOUND, LEVELS, bounding_scale, largest_sums

LIMIT = 127  # largest magnitude of a quantized weight
LOSSLESS = 150.0  # dB; more than the 24 bits of float32 themselves have

# Four roundings to float32 lie between a weight's integer and what the scale found makes of it.
EXACT = 5e-7
AT_ONCE = 1 << 22  # weights under test together: what keeps the temporary arrays in the cache


class Quantized(NamedTuple):
    """Levels q (T, K) u8 of an input, which stand for low + scale q; low and scale are (T, 1)."""

    levels: np.ndarray
    low: np.ndarray
    scale: np.ndarray

    def values(self) -> np.ndarray:
        """What the levels stand for, (T, K) float32."""
        return self.low + self.scale * self.levels.astype(np.float32)


def quantize_input(x: np.ndarray, low: float | None = None, high: float | None = None) -> Quantized:
    """Quantize x (T, K) to 8 bits: between `low` and `high`, or per token between its own ends.

    What lies outside of the range is clipped to its nearer end.
    """
    lows, highs = x.min(1, keepdims=True), x.max(1, keepdims=True)
    if low is not None and high is not None:
        lows, highs = np.full_like(lows, low), np.full_like(highs, high)
    scale = (highs - lows) / np.float32(LEVELS)
    scale = np.where(scale > 0, scale, np.float32(1))  # a token of equal values is all low
    levels = np.clip(np.rint((x - lows) / scale), 0, LEVELS).astype(np.uint8)
    return Quantized(levels, lows, scale)


def quantize_weights(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The s8 integers of w (K, N) for the scale (N,) of each output channel."""
    return np.clip(np.rint(w / scale), -LIMIT, LIMIT).astype(np.int8)


def weight_scales(w: np.ndarray) -> np.ndarray:
    """The scale (N,) of each output channel of w (K, N): max|w| / 127.

    A channel that is already scale × integers up to 127, as in a checkpoint that was quantized and
    dequantized, gets such a scale back, so that quantizing it again loses nothing. Of the scales
    that do, it is the largest.
    """
    largest = np.abs(w).max(0)
    scale = np.maximum(largest / np.float32(LIMIT), np.finfo(np.float32).tiny)
    steps = _steps(w, largest)
    for column in np.flatnonzero(steps):
        scale[column] = _nearest_scale(w[:, column], largest[column] / np.float32(steps[column]))
    return np.where(largest > 0, scale, np.float32(1)).astype(np.float32)


def bounded_scales(w: np.ndarray) -> np.ndarray | None:
    """As :func:`weight_scales`, of integers that ``schedules.reference.BOUND`` holds for: about
    1.8 times as wide a step. None where a channel that was quantized before would lose by it.
    """
    scale = weight_scales(w)
    levels = quantize_weights(w, scale)
    over = largest_sums(levels) > BOUND
    far, own = w[:, over], scale[over]
    if (np.abs(far - levels[:, over] * own) <= EXACT * np.abs(far)).all(0).any():
        return None
    return np.where(over, np.maximum(scale, bounding_scale(w)), scale)


def _steps(w: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """For each channel the smallest integer that its largest weight can be, 0 where none can.

    Every candidate 1 … 127 is tried on a few rows, then what is left of them on more: of a channel
    that was never quantized nothing is left after the first rows.
    """
    columns = np.tile(np.flatnonzero(largest > 0), LIMIT)
    steps = np.repeat(np.arange(1, LIMIT + 1, dtype=np.float32), len(columns) // LIMIT)
    factors = steps / largest[columns]
    row = 0
    while row < len(w) and len(columns):
        count = max(4, AT_ONCE // len(columns))
        multiples = np.abs(w[row : row + count, columns]) * factors
        exact = np.abs(multiples - np.rint(multiples)) <= EXACT * multiples
        keep = exact.all(0)
        columns, steps, factors = columns[keep], steps[keep], factors[keep]
        row += count
    smallest = np.zeros(w.shape[1], np.int64)
    smallest[columns[::-1]] = steps[::-1]  # of several the first, which is the smallest, stays
    return smallest


def _nearest_scale(column: np.ndarray, scale: np.float32) -> np.float32:
    """Of the floats beside `scale` the one that gives back most weights to the last bit."""
    around = [scale]
    for end in (np.float32(0), np.float32(np.inf)):
        near = np.nextafter(scale, end)
        around += [near, np.nextafter(near, end)]
    integers = np.rint(column / scale)
    return max(around, key=lambda near: int(np.sum(near * integers == column)))


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 values rounded to the nearest that bfloat16 has, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def signal_to_noise(x: np.ndarray, rounded: np.ndarray) -> float:
    """10 log10(sum x² / sum (x - rounded)²) in dB, at most LOSSLESS."""
    signal = float(np.square(x, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(x, rounded, dtype=np.float64)).sum())
    if noise <= signal * 10 ** (-LOSSLESS / 10):
        return LOSSLESS
    return float(10 * np.log10(signal / noise)) if signal else 0.0


def computed(x: np.ndarray, w: np.ndarray, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    """What a layer of this plan sees in place of its input x (T, K) and its weight w (K, N).

    A smoothed layer's operands are given as they are without smoothing.
    """
    return SEEN[plan.precision](x, w, plan)


def _in_bytes(x: np.ndarray, w: np.ndarray, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    def rounded(smoothed: np.ndarray) -> np.ndarray:
        skipped = plan.bounded is None or plan.skips_zeros
        scale = weight_scales(smoothed) if skipped else plan.bounded
        return quantize_weights(smoothed, scale) * scale

    return _smoothed(x, w, plan, rounded)


def _in_four_bits(x: np.ndarray, w: np.ndarray, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    def rounded(smoothed: np.ndarray) -> np.ndarray:
        return (plan.rounded or quantize_groups(smoothed, plan.group)).values()

    return _smoothed(x, w, plan, rounded)


def _smoothed(
    x: np.ndarray, w: np.ndarray, plan: LayerPlan, rounded: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    smooth = np.float32(1) if plan.smooth is None else plan.smooth
    column = np.reshape(smooth, (-1, 1))
    inputs = quantize_input(x * smooth, plan.low, plan.high).values() / smooth
    return inputs, rounded(w / column) * column


SEEN: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "fp32": lambda x, w, plan: (x, w),
    "fp16": lambda x, w, plan: (x, w.astype(np.float16).astype(np.float32)),
    "bf16": lambda x, w, plan: (round_to_bf16(x), round_to_bf16(w)),
    "int8": _in_bytes,
    "int4": _in_four_bits,
}


def layer_report(
    plan: Mapping[str, LayerPlan],
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A row per layer of `plan`, in dB against float32, the worst output first.

    `weights` has w (K, N) and `inputs` some tokens x (T, K) of each layer. Keys: "layer",
    "precision", "range" (of an 8-bit input: dynamic, or its two ends), "smooth" (yes, no), "input
    dB", "weight dB", "output dB", "why"; what a layer in float32 has none of is None.
    """
    rows = [_row(name, layer, weights[name], inputs[name]) for name, layer in plan.items()]
    return sorted(rows, key=lambda row: row["output dB"] or LOSSLESS)


def _row(name: str, plan: LayerPlan, w: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    row = {"layer": name, "precision": plan.precision, "range": None, "smooth": None}
    decibels = (None, None, None)
    if plan.quantized:
        row["range"] = f"{plan.low:.3g} … {plan.high:.3g}" if plan.static else "dynamic"
        row["smooth"] = "yes" if plan.smooth is not None else "no"
    if plan.precision != "fp32":
        inputs, weights = computed(x, w, plan)
        pairs = ((x, inputs), (w, weights), (x @ w, inputs @ weights))
        decibels = tuple(signal_to_noise(*pair) for pair in pairs)
    return {
        **row,
        **dict(zip(("input dB", "weight dB", "output dB"), decibels)),
        "why": plan.why or None,
    }
