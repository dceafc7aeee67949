"""A linear layer's weights and its plan come in; the arrays that its kernel reads go out."""

from __future__ import annotations

import numpy as np

from bertile.precision import LayerPlan
from bertile.quantization import quantize_weights, weight_scales
from bertile.schedules.reference import LEVELS
from bertile.schedules.task import Task

Arrays = list[tuple[str, np.ndarray]]


def dense_weights(
    task: Task, name: str, w: np.ndarray, bias_name: str, b: np.ndarray, plan: LayerPlan
) -> Arrays:
    """Names and values in the order of the kernel's arguments, not yet packed.

    Bytes: x ≈ low + s q, w ≈ scale v, so x w + b ≈ s scale Σ q v + low shift + b with
    shift = scale Σ v. With one range for all tokens, s goes into scale, and low shift into b.
    """
    precision = task.shape.get("precision", "fp32")
    if not str(precision).startswith("int8"):
        return [(name, w), (bias_name, b)]
    if plan.smooth is not None:
        w = w / plan.smooth[:, None]
    scale = weight_scales(w)
    v = quantize_weights(w, scale)
    shift = (v.sum(0, dtype="int64") * scale.astype("float64")).astype("float32")
    if precision == "int8":
        return [(name, v), (f"{name}.scale", scale), (f"{name}.shift", shift), (bias_name, b)]
    low, step = plan.low, (plan.high - plan.low) / LEVELS
    folded = (b + np.float64(low) * shift).astype("float32")
    return [
        (name, v),
        (f"{name}.scale", (scale * np.float32(step)).astype("float32")),
        (f"{name}.bias", folded),
    ]
