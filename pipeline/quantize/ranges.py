"""Chooses the ends of a layer's 8-bit range, or the factors that smooth its channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bertile.numerics.histogram import Histogram
from bertile.quantize.observer import Observation
from bertile.schedules.reference import LEVELS

PERCENTILE = 99.99
CANDIDATES = 256  # for each end of a range; the finest bins are 2048

Ends = tuple[float, float]


def minmax(seen: Observation) -> Ends:
    """Everything that was observed."""
    return seen.low, seen.high


def percentile(seen: Observation, percent: float = PERCENTILE) -> Ends:
    """What is left without the same share of the smallest and of the largest values."""
    histogram = seen.histogram
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    outside = (1 - percent / 100) / 2
    first = int(np.searchsorted(share, outside, side="right"))
    last = int(np.searchsorted(share, 1 - outside))
    edges = _edges(histogram)
    return max(float(edges[first]), seen.low), min(float(edges[last + 1]), seen.high)


def mse(seen: Observation) -> Ends:
    """The ends with the smallest squared error: of clipping outside, of rounding inside.

    Rounding to steps of s has the error s²/12 where values are spread evenly over a step.
    """
    edges, centers = _edges(seen.histogram), seen.histogram.centers
    counts = seen.histogram.counts.astype(np.float64)
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    lows = np.unique(np.linspace(0, middle, CANDIDATES).astype(int))
    highs = np.unique(np.linspace(middle + 1, len(counts), CANDIDATES).astype(int))
    below = _clipping(centers, counts, edges[lows], lows)
    above = _clipping(-centers[::-1], counts[::-1], -edges[highs], len(counts) - highs)
    inside = np.append(0, np.cumsum(counts))
    step = (edges[highs] - edges[lows][:, None]) / LEVELS
    rounding = (inside[highs] - inside[lows][:, None]) * step**2 / 12
    best = np.argmin(below[:, None] + above + rounding)
    low, high = np.unravel_index(best, (len(lows), len(highs)))
    return max(float(edges[lows[low]]), seen.low), min(float(edges[highs[high]]), seen.high)


METHODS: dict[str, Callable[[Observation], Ends]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}


def choose(seen: Observation, method: str) -> Ends:
    """The ends by one of METHODS, a little apart where all values were equal."""
    low, high = METHODS[method](seen)
    return low, max(high, low + max(abs(low), 1.0) * 1e-6)


def smoothing(channels: np.ndarray, w: np.ndarray, strength: float) -> np.ndarray:
    """The factors (K,) by which to multiply the channels of an input before it is quantized.

    `channels` (K,) are the largest |x|, w is (K, N). SmoothQuant (Xiao et al. 2022, equation 4)
    divides by s = max|x|^strength / max|w|^(1 - strength), which moves outliers of the input into
    the weights: with strength 0.5 both have the same largest values. Channels that are always
    zero, on either side, stay as they are.
    """
    rows = np.abs(w).max(1)
    used = (channels > 0) & (rows > 0)
    x, y = np.where(used, channels, 1), np.where(used, rows, 1)
    return (y ** (1 - strength) / x**strength).astype(np.float32)


def _edges(histogram: Histogram) -> np.ndarray:
    return histogram.width * (histogram.first + np.arange(len(histogram.counts) + 1.0))


def _clipping(centers: np.ndarray, counts: np.ndarray, ends: np.ndarray, bins: np.ndarray):
    """The squared error of moving the values of the first `bins` bins up to `ends`, for each."""
    zeroth, first, second = (np.append(0, np.cumsum(counts * centers**power)) for power in range(3))
    return second[bins] - 2 * ends * first[bins] + ends**2 * zeroth[bins]
