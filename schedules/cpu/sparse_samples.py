"""Draws trial operands of the sparse matrix product: the dense one's, most lanes zero."""

from __future__ import annotations

import numpy as np

from bertile.schedules.cpu import dense_samples
from bertile.schedules.cpu.product import group
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task


def sample(task: Task, blocks: int, rng: np.random.Generator) -> Sample:
    """Random operands, ``density`` percent of the lanes of weights not zero."""
    w, b = dense_samples.random_weights(task, rng)
    share = task.shape["density"] / 100
    each = group(task)
    kept = rng.random((-(-len(w) // each), w.shape[1])) < share
    w = np.where(kept.repeat(each, 0)[: len(w)], w * np.float32(share**-0.5), np.float32(0))
    return dense_samples.product_sample(task, blocks, rng, w, b)
