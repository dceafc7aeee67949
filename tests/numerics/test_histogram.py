"""Histograms: every value counted once, in the bin it belongs to, however they are added up."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.histogram import BINS, Histogram

RANDOM = np.random.default_rng(3)


def assert_counts(found: Histogram, values: np.ndarray) -> None:
    edges = found.width * (found.first + np.arange(len(found.counts) + 1))
    values = values.ravel().astype("float64")
    want = [np.sum((values >= low) & (values < high)) for low, high in zip(edges, edges[1:])]
    np.testing.assert_array_equal(found.counts, want)
    assert found.counts.sum() == values.size
    assert found.counts[0] and found.counts[-1], "no bin beyond the values"


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-6, 5), (300, -1e4), (1e-12, 0)])
def test_every_value_is_in_its_bin(scale, offset):
    values = (RANDOM.standard_normal((7, 31)) * scale + offset).astype("float32")
    assert_counts(Histogram.of(values), values)


def test_bins_are_fine_and_not_many():
    found = Histogram.of(RANDOM.uniform(-3, 4, 10_000).astype("float32"))
    assert BINS / 2 <= len(found.counts) <= BINS + 1


def test_adding_up_in_any_order_is_the_same_as_all_at_once():
    parts = [
        (RANDOM.standard_normal(500) * scale + offset).astype("float32")
        for scale, offset in ((1, 0), (0.01, 3), (50, -20), (1e-4, 900))
    ]
    forward = backward = None
    for part in parts:
        one = Histogram.of(part)
        forward = one if forward is None else forward.with_more(one)
        backward = one if backward is None else one.with_more(backward)
    everything = np.concatenate(parts)
    for found in (forward, backward):
        assert_counts(found, everything)
        assert len(found.counts) <= BINS + 1
    assert forward.width == backward.width == Histogram.of(everything).width


def test_equal_values_are_one_bin():
    for value in (0.0, -7.25, 1e6):
        found = Histogram.of(np.full(9, value, "float32"))
        assert found.counts.tolist() == [9]
        assert found.centers[0] == pytest.approx(value, rel=1e-6, abs=1e-29)


def test_centers_are_in_the_middle_of_the_bins():
    found = Histogram.of(np.array([0.0, 1.0], "float32"))
    np.testing.assert_allclose(found.centers[[0, -1]], [found.width / 2, 1 + found.width / 2])
