"""Normalises layers: a row stays in the registers of its warps from the load to the store;
statistics in float32, the variance from the differences to the mean. ``rms`` is RMSNorm: x by the
root of its mean square, without the mean taken off.

    x (rows, pitch(C)), gamma (C), beta (C), [smooth (C)], [limits (2)]
        →  y (rows, pitch(C)), [q u8 (rows, pitch(C)), [range (rows, 2)]]

With a ``kind`` the result is also written as bytes (see ``narrow``), from before y was rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cuda import row_kernel
from bertile.schedules.cuda.forms import element, from_rows, symbols, to_rows
from bertile.schedules.cuda.narrow import narrow_sample, sample_weights
from bertile.schedules.cuda.row_kernel import Narrow, padded
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Knobs, Row, Sample, Schedule
from bertile.schedules.task import Task

# what the row is multiplied by is on its way while the sums wait for x
ASK = """\
  alignas(16) __shared__ float gammas[HALVES], betas[HALVES];
  ask_for(gamma, gammas);
  ask_for(beta, betas);
  copy_commit();
  warp_sync();  // else ptxas moves the copies down to where they are waited for
"""
NORMALIZE = """
  row.normalize(x, gammas, betas);
  row.store<X>(y + static_cast<long long>(row.row) * PITCH, x);"""


def kernel(task: Task, knobs: Knobs, row: Row) -> Kernel:
    """(x, gamma, beta, [smooth], [limits], y, [q, [range]])."""
    load = "  row.load<X>(source + static_cast<long long>(row.row) * PITCH, x);"
    first = [(f"const {element(task)}", "source")]
    return normalizing_kernel(task, knobs, first, [], "", load)


def normalizing_kernel(
    task: Task,
    knobs: Knobs,
    first: Sequence[tuple[str, str]],
    extents: Sequence[str],
    helpers: str,
    load: str,
) -> Kernel:
    """A kernel that ends in a LayerNorm of what ``load`` puts into ``x``."""
    narrow = Narrow.of(task)
    kinds = {"q": "u8", "range": "float"}
    parameters = [
        *first,
        *(("const float", name) for name in ("gamma", "beta", *narrow.inputs)),
        (element(task), "y"),
        *((kinds[name], name) for name in narrow.results),
    ]
    body = f"{ASK}{load}{NORMALIZE}\n  {narrow.call}"
    return row_kernel.row_kernel(task, knobs, parameters, extents, helpers, body)


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """Vectors padded to the pitch."""
    return padded(weights, int(task.shape["channels"]))


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Activations off centre, so that a variance that loses digits shows."""
    channels = int(task.shape["channels"])
    gamma, beta = (rng.standard_normal(channels).astype("float32") for _ in range(2))
    weights = [gamma, beta, *sample_weights(task, rng)]
    x = to_rows(rng.standard_normal((blocks * BLOCK_TOKENS, channels)) * 3 + 5, element(task))
    values = from_rows(x, channels).astype("float64")
    more = (task.shape["epsilon"], bool(task.shape.get("rms")))
    expected = reference.layer_norm(values, gamma, beta, *more)
    return narrow_sample(task, [x], weights, expected, symbols(len(x)), wide=True)


def flops(task: Task, tokens: int) -> float:
    """Eight per value: sum, difference, square and sum, centre, normalise, scale and shift."""
    return 8.0 * tokens * task.shape["channels"]


layer_norm = Schedule(
    "layer_norm", row_kernel.space, row_kernel.default, kernel, sample, flops, pack
)
