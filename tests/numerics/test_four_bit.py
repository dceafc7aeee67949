"""Groups rounded to 4 bits: what is on the grid stays, and no other scale tried is better."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.eight_bit import computed, signal_to_noise
from bertile.numerics.four_bit import HIGHEST, LOWEST, SHARES, quantize_groups
from bertile.numerics.precision import LayerPlan

RANDOM = np.random.default_rng(11)
SHAPES = [(64, 5), (70, 3), (31, 4), (1, 2), (129, 1)]


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype("float32")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_on_the_grid_lose_nothing(shape, size):
    levels = RANDOM.integers(LOWEST, HIGHEST + 1, shape)
    levels[::size] = LOWEST  # each group reaches the end of its range
    scales = np.exp2(RANDOM.integers(-9, 3, (-(-shape[0] // size), shape[1])))
    w = (levels * scales.repeat(size, 0)[: shape[0]]).astype("float32")
    rounded = quantize_groups(w, size)
    np.testing.assert_array_equal(rounded.values(), w)
    assert rounded.levels.dtype == np.int8 and rounded.scales.dtype == np.float16


@pytest.mark.parametrize("shape", SHAPES)
def test_each_group_has_the_best_of_the_scales_tried(shape):
    w, size = normal(*shape), 32
    rounded = quantize_groups(w, size)
    assert rounded.levels.min() >= LOWEST and rounded.levels.max() <= HIGHEST
    for group in range(-(-shape[0] // size)):
        for n in range(shape[1]):
            part = w[group * size : (group + 1) * size, n]
            mine = rounded.values()[group * size : (group + 1) * size, n]
            end = part[np.abs(part).argmax()]
            for share in SHARES:
                scale = np.float32(np.float16(end * np.float32(share / LOWEST)))
                other = np.clip(np.rint(part / scale), LOWEST, HIGHEST) * scale
                assert np.square(part - mine).sum() <= np.square(part - other).sum() * (1 + 1e-5)


def test_zeros_stay_zeros_and_a_group_of_zeros_is_nothing():
    w = normal(96, 4)
    w[32:64] = 0
    w[::3] = 0
    values = quantize_groups(w, 32).values()
    assert np.all(values[w == 0] == 0)


def test_weights_that_float16_cannot_scale_are_nothing_rather_than_wrong():
    w = np.full((32, 1), 1e-9, "float32")
    assert np.all(quantize_groups(w, 32).values() == 0)


def test_a_layer_sees_its_rounded_weight_divided_by_what_smooths_it():
    x, w, smooth = normal(40, 64), normal(64, 8), np.exp(normal(64))
    plan = LayerPlan("int4", smooth=smooth)
    _, seen = computed(x, w, plan)
    column = smooth[:, None]
    np.testing.assert_allclose(seen, quantize_groups(w / column, 32).values() * column, rtol=1e-6)
    other = quantize_groups(normal(64, 8), 32)
    _, seen = computed(x, w, LayerPlan("int4", rounded=other))
    np.testing.assert_array_equal(seen, other.values())


def test_smaller_groups_have_less_noise():
    w = normal(512, 64)
    noise = [signal_to_noise(w, quantize_groups(w, size).values()) for size in (32, 64)]
    assert noise[0] > noise[1] > 19
