"""Rounds weights to 4 bits, a scale for each output of a group of inputs.

A weight is level × scale, level -8 to 7, scale a float16: w (K, N) has (ceil(K / size), N) of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LOWEST, HIGHEST = -8, 7
SIZES = (32, 64)  # inputs of a group
# Of the scale that takes a group's largest magnitude to -8: less clips it, and rounds the others
# finer; the last of them takes it to 7.
SHARES = (1.0, 0.93, 0.86, -8 / 7)


class FourBits(NamedTuple):
    """``levels`` (K, N) int8 and ``scales`` (G, N) float16, of groups of ``size`` inputs."""

    levels: np.ndarray
    scales: np.ndarray
    size: int

    def values(self) -> np.ndarray:
        """What the levels stand for, (K, N) float32."""
        wide = self.scales.astype(np.float32).repeat(self.size, 0)
        return self.levels * wide[: len(self.levels)]


def quantize_groups(w: np.ndarray, size: int) -> FourBits:
    """Round w (K, N) to nearest, in each group by the scale of SHARES with the least error."""
    groups = np.pad(w, ((0, -len(w) % size), (0, 0))).reshape(-1, size, w.shape[1])
    scales = best_scales(groups)
    levels = _levels(groups, scales[:, None]).reshape(-1, w.shape[1])
    return FourBits(levels[: len(w)], scales, size)


def best_scales(groups: np.ndarray, shares: Sequence[float] = SHARES) -> np.ndarray:
    """The scales (G, N) float16 of groups (G, size, N)."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]
    best = np.ones(largest.shape, np.float16)
    least = np.full(largest.shape, np.inf, np.float32)
    for share in shares:
        scale = (largest * np.float32(share / LOWEST)).astype(np.float16)
        error = groups - _levels(groups, scale[:, None]) * scale[:, None].astype(np.float32)
        error = np.einsum("gkn,gkn->gn", error, error)
        better = (error < least) & (scale != 0)
        best[better], least[better] = scale[better], error[better]
    return best


def _levels(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The nearest levels, int8; a scale of nothing gives nothing."""
    scales = scales.astype(np.float32)
    steps = np.divide(w, scales, out=np.zeros_like(w), where=scales != 0)
    return np.clip(np.rint(steps), LOWEST, HIGHEST).astype(np.int8)


def round_to(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The levels int8 of rows w (…, N) by scales (N) float16."""
    return _levels(w, np.broadcast_to(scales, w.shape))
