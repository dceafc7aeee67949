"""Rounds a weight to 4 bits so that a layer's output changes least on inputs that were observed.

GPTQ (Frantar et al. 2023): the inputs are rounded one after the other, and the error of each is
made up for by those that are still to come, as far as inputs go together.
"""

from __future__ import annotations

import numpy as np

from bertile.numerics.four_bit import FourBits, best_scales, round_to

DAMP = 0.01  # of the mean of the diagonal, added to it
BLOCK = 128  # inputs whose errors are handed to all others at once


def quantize(w: np.ndarray, moments: np.ndarray, size: int) -> FourBits:
    """Round w (K, N) in groups of ``size`` inputs; ``moments`` (K, K) is the sum of x xᵀ over
    tokens.

    Inputs that never were anything but zero are rounded to nearest.
    """
    inputs, outputs = w.shape
    rest = w.astype(np.float32).copy()
    upper = factor(moments)
    levels = np.zeros((inputs, outputs), np.int8)
    scales = np.ones((-(-inputs // size), outputs), np.float16)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = np.zeros((stop - start, outputs), np.float32)
        for k in range(start, stop):
            group = k // size
            if k % size == 0:  # of what the inputs before it have made of it
                scales[group] = best_scales(rest[k : k + size][None])[0]
            levels[k] = round_to(rest[k], scales[group])
            error = rest[k] - levels[k] * scales[group].astype(np.float32)
            errors[k - start] = error / upper[k, k]
            rest[k + 1 : stop] -= upper[k, k + 1 : stop, None] * errors[k - start]
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    return FourBits(levels, scales, size)


def factor(moments: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor (K, K) of the inverse of the damped moments."""
    damped = moments.astype(np.float64)
    diagonal = np.diag(damped).copy()
    diagonal[diagonal == 0] = max(1.0, float(diagonal.mean()))
    np.fill_diagonal(damped, diagonal + DAMP * diagonal.mean())
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
