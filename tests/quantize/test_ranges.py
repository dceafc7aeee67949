"""Ends of ranges: against sorted values, a search on the values themselves, and a formula."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.eight_bit import quantize_input, signal_to_noise
from bertile.quantize.observer import Observation
from bertile.quantize.ranges import METHODS, choose, minmax, mse, percentile, smoothing

RANDOM = np.random.default_rng(11)


def seen(x: np.ndarray) -> Observation:
    return Observation.of(x.reshape(-1, x.shape[-1]).astype("float32"))


def error(x: np.ndarray, ends: tuple[float, float]) -> float:
    return float(np.square(quantize_input(x, *ends).values() - x).mean())


@pytest.fixture
def tailed() -> np.ndarray:
    """Mostly small values, a few far out on one side, as behind GELU."""
    x = RANDOM.standard_normal((400, 50)) * 0.3 + 0.5
    x.reshape(-1)[::1000] += 30
    return x.astype("float32")


def test_minmax_is_what_was_seen():
    assert minmax(seen(np.array([[-2.5, 7.0, 1.0]]))) == (-2.5, 7.0)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentile_leaves_the_same_share_out_at_both_ends(percent):
    x = RANDOM.standard_normal((1000, 20)).astype("float32")
    low, high = percentile(seen(x), percent)
    width = seen(x).histogram.width
    outside = (100 - percent) / 2
    assert low == pytest.approx(np.percentile(x, outside), abs=2 * width)
    assert high == pytest.approx(np.percentile(x, 100 - outside), abs=2 * width)
    assert x.min() <= low and high <= x.max()


def test_mse_finds_what_a_search_on_the_values_finds(tailed):
    ends = [
        (low, high)
        for low in np.linspace(tailed.min(), 0, 20)
        for high in np.linspace(1, tailed.max(), 60)
    ]
    best = min(error(tailed, end) for end in ends)
    assert error(tailed, mse(seen(tailed))) <= 1.05 * best


def test_mse_clips_where_that_is_better_and_only_there(tailed):
    for x in (tailed, RANDOM.uniform(-1, 3, (300, 40)).astype("float32"), -tailed):
        assert error(x, mse(seen(x))) <= 1.01 * error(x, minmax(seen(x)))
    even = RANDOM.uniform(-1, 3, (300, 40)).astype("float32")
    np.testing.assert_allclose(mse(seen(even)), minmax(seen(even)), atol=0.03)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -4.0, 1e5])
def test_range_of_equal_values_is_not_empty(method, value):
    low, high = choose(seen(np.full((9, 4), value)), method)
    assert low < np.float32(high) and low == pytest.approx(value, abs=1e-6 * max(1, abs(value)))


@pytest.mark.parametrize("method", METHODS)
def test_range_lies_within_what_was_seen(method, tailed):
    low, high = choose(seen(tailed), method)
    assert tailed.min() <= low < high <= tailed.max()


def test_smoothing_makes_both_sides_equally_large():
    x = np.abs(RANDOM.standard_normal(16)) * np.logspace(-2, 2, 16)
    w = RANDOM.standard_normal((16, 9)).astype("float32")
    factors = smoothing(x.astype("float32"), w, 0.5)
    np.testing.assert_allclose(x * factors, np.abs(w).max(1) / factors, rtol=1e-5)


def test_smoothing_of_strength_0_and_1_moves_nothing_or_all():
    x, w = np.array([4.0, 0.5], "float32"), np.array([[2.0], [0.1]], "float32")
    np.testing.assert_allclose(smoothing(x, w, 1.0), [0.25, 2.0])
    np.testing.assert_allclose(smoothing(x, w, 0.0), [2.0, 0.1])


def test_smoothing_leaves_channels_that_are_zero():
    x, w = np.array([0.0, 3.0, 5.0], "float32"), np.array([[2.0], [0.0], [5.0]], "float32")
    np.testing.assert_allclose(smoothing(x, w, 0.5), [1, 1, 1])


def test_smoothing_helps_a_layer_with_an_outlier_channel():
    x = RANDOM.standard_normal((200, 64)).astype("float32")
    x[:, 5] *= 60
    w = RANDOM.standard_normal((64, 32)).astype("float32")
    w[5] *= 0.05
    factors = smoothing(np.abs(x).max(0), w, 0.5)

    def quality(factor):
        return signal_to_noise(x @ w, quantize_input(x * factor).values() / factor @ w)

    assert quality(factors) > quality(np.ones(64, "float32")) + 6
