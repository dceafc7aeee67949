"""Histograms: every value counted once, in the bin it belongs to, however they are added up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bertile.numerics.histogram import BINS, Histogram

RANDOM = np.random.default_rng(3)


def assert_counts(histogram: Histogram, values: np.ndarray) -> None:
    edges = histogram.width * (histogram.first + np.arange(len(histogram.counts) + 1))
    values = values.ravel().astype("float64")
    want = [np.sum((values >= low) & (values < high)) for low, high in itertools.pairwise(edges)]
    np.testing.assert_array_equal(histogram.counts, want)
    assert histogram.counts.sum() == values.size
    assert histogram.counts[0] and histogram.counts[-1], "no bin beyond the values"


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-6, 5), (300, -1e4), (1e-12, 0)])
def test_every_value_is_in_its_bin(scale, offset):
    values = (RANDOM.standard_normal((7, 31)) * scale + offset).astype("float32")
    assert_counts(Histogram.of(values), values)


def test_bins_are_fine_and_not_many():
    histogram = Histogram.of(RANDOM.uniform(-3, 4, 10_000).astype("float32"))
    assert BINS / 2 <= len(histogram.counts) <= BINS + 1


def test_adding_up_in_any_order_is_the_same_as_all_at_once():
    parts = [
        (RANDOM.standard_normal(500) * scale + offset).astype("float32")
        for scale, offset in ((1, 0), (0.01, 3), (50, -20), (1e-4, 900))
    ]
    forward = backward = None
    for part in parts:
        of_part = Histogram.of(part)
        forward = of_part if forward is None else forward.with_more(of_part)
        backward = of_part if backward is None else of_part.with_more(backward)
    everything = np.concatenate(parts)
    for histogram in (forward, backward):
        assert_counts(histogram, everything)
        assert len(histogram.counts) <= BINS + 1
    assert forward.width == backward.width == Histogram.of(everything).width


def test_equal_values_are_one_bin():
    for value in (0.0, -7.25, 1e6):
        histogram = Histogram.of(np.full(9, value, "float32"))
        assert histogram.counts.tolist() == [9]
        assert histogram.centers[0] == pytest.approx(value, rel=1e-6, abs=1e-29)


def test_centers_are_in_the_middle_of_the_bins():
    histogram = Histogram.of(np.array([0.0, 1.0], "float32"))
    np.testing.assert_allclose(
        histogram.centers[[0, -1]], [histogram.width / 2, 1 + histogram.width / 2]
    )
