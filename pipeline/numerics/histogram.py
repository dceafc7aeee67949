"""Counts how often which values occur, in bins that widen as the values spread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 2048


@dataclass(frozen=True, eq=False)
class Histogram:
    """Bin i counts the values from `width` (first + i) up to the next.

    The width is a power of two, so that the bins of two histograms nest and adding up is exact; at
    most BINS + 1 bins lie between the smallest and the largest value.
    """

    width: float
    first: int
    counts: np.ndarray  # (bins,) int64

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """The histogram of an array of any shape."""
        low, high = float(values.min()), float(values.max())
        width = _width(low, high)
        bins = np.floor(values.ravel() / width).astype(np.int64)
        first = int(np.floor(low / width))
        return cls(width, first, np.bincount(bins - first))

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin."""
        return self.width * (self.first + np.arange(len(self.counts)) + 0.5)

    def with_more(self, other: Histogram) -> Histogram:
        """Both together, in bins that hold the values of both."""
        ends = [
            (histogram.first * histogram.width, histogram._end * histogram.width)
            for histogram in (self, other)
        ]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        width = max(self.width, other.width, _width(low, high))
        parts = [self._widened(width), other._widened(width)]
        first = min(part.first for part in parts)
        counts = np.zeros(max(part._end for part in parts) - first, np.int64)
        for part in parts:
            counts[part.first - first : part._end - first] += part.counts
        return Histogram(width, first, counts)

    @property
    def _end(self) -> int:
        return self.first + len(self.counts)

    def _widened(self, width: float) -> Histogram:
        bins = (self.first + np.arange(len(self.counts))) // round(width / self.width)
        first = int(bins[0])
        counts = np.zeros(int(bins[-1]) - first + 1, np.int64)
        np.add.at(counts, bins - first, self.counts)
        return Histogram(width, first, counts)


def _width(low: float, high: float) -> float:
    """The smallest power of two of which BINS span the values, and which float32 can tell apart."""
    finest = max(abs(low), abs(high), 1e-30) * 2.0**-24
    return float(2.0 ** np.ceil(np.log2(max((high - low) / BINS, finest))))
