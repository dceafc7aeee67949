"""Makes the arrays that a linear layer's kernel reads, of its weights and its plan."""

from __future__ import annotations

import numpy as np

from bertile.lower.form import Form
from bertile.numerics.eight_bit import quantize_weights, weight_scales
from bertile.numerics.four_bit import quantize_groups
from bertile.numerics.precision import PRECISIONS, LayerPlan, Plan
from bertile.schedules.reference import LEVELS, byte_limits
from bertile.schedules.task import Task

Arrays = list[tuple[str, np.ndarray]]


def dense_weights(task: Task, weights: Arrays, plan: LayerPlan) -> Arrays:
    """Names and values in the order of the kernel's arguments, not yet packed; ``weights`` are
    w (K, N) and b (N). What is zero in w is zero in them, whatever the precision.

    Bytes: x ≈ low + s q, w ≈ scale v, so x w + b ≈ s scale Σ q v + low shift + b with
    shift = scale Σ v. With one range for all tokens, s goes into scale, and low shift into b. In 4
    bits scale is that of a group.
    """
    if not plan.quantized:
        return weights
    (name, w), (bias_name, b) = weights
    if plan.smooth is not None:
        w = w / plan.smooth[:, None]
    if PRECISIONS[plan.precision].groups:
        rounded = plan.rounded or quantize_groups(w, plan.group)
        shift = rounded.values().sum(0, dtype="float64").astype("float32")
        arrays = {name: rounded.levels, f"{name}.scales": rounded.scales}
        return [*arrays.items(), (f"{name}.shift", shift), (bias_name, b)]
    bounded = plan.bounded if task.operation == "dense" else None
    scale = weight_scales(w) if bounded is None else bounded
    v = quantize_weights(w, scale)
    shift = (v.sum(0, dtype="int64") * scale.astype("float64")).astype("float32")
    if not plan.static:
        return [(name, v), (f"{name}.scale", scale), (f"{name}.shift", shift), (bias_name, b)]
    low, step = plan.low, (plan.high - plan.low) / LEVELS
    folded = (b + np.float64(low) * shift).astype("float32")
    return [
        (name, v),
        (f"{name}.scale", (scale * np.float32(step)).astype("float32")),
        (f"{name}.bias", folded),
    ]


def narrowing(form: Form, plan: Plan) -> Arrays:
    """What a kernel that writes a form reads beside the values: the smoothing factors that they are
    multiplied by first, and the range that bytes lie in where one serves all tokens.
    """
    if not form.owner:
        return []
    owner = plan[form.owner]
    arrays = [] if owner.smooth is None else [(f"{form.owner}.smooth", owner.smooth)]
    if form.in_bytes and not form.ranges:
        arrays.append((f"{form.owner}.limits", byte_limits(owner.low, owner.high)))
    return arrays
