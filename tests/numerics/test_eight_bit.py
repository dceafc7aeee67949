"""Scales found again to the last bit, ranges per token and for all, decibels against formulas."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.eight_bit import (
    LOSSLESS,
    bounded_scales,
    computed,
    layer_report,
    quantize_input,
    quantize_weights,
    round_to_bf16,
    signal_to_noise,
    weight_scales,
)
from bertile.numerics.precision import LayerPlan
from bertile.schedules.reference import BOUND, largest_sums

RANDOM = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype("float32")


@pytest.mark.parametrize("inputs", [1, 3, 37, 312])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_that_were_quantized_before_lose_nothing(inputs, per_channel):
    w = normal(inputs, 23) * np.exp(normal(23))
    largest = np.abs(w).max(0 if per_channel else None)
    scale = np.broadcast_to(largest / np.float32(127), (23,))
    before = np.clip(np.rint(w / scale), -127, 127).astype("float32") * scale
    recovered = weight_scales(before)
    again = quantize_weights(before, recovered)
    np.testing.assert_array_equal(again.astype("float32") * recovered, before)


def test_scale_is_found_where_the_largest_integer_is_small():
    integers = RANDOM.integers(-5, 6, (64, 9)).astype("float32")
    before = integers * np.float32(0.0123)
    np.testing.assert_array_equal(quantize_weights(before, weight_scales(before)), integers)


@pytest.mark.parametrize("rows", [2, 16, 200])
def test_weights_never_quantized_use_all_of_127(rows):
    w = normal(rows, 50) + np.float32(1e-3)
    np.testing.assert_allclose(weight_scales(w), np.abs(w).max(0) / 127, rtol=1e-6)


def test_outlier_does_not_swallow_the_small_weights_of_its_channel():
    w = normal(100, 1) * np.float32(1e-7)  # all far below one step of the outlier
    w[40] = 1.0
    assert weight_scales(w) == pytest.approx(1 / 127, rel=1e-6)


def test_channel_of_zeros_has_a_scale_that_divides():
    w = np.zeros((8, 2), "float32")
    w[:, 1] = 1.0
    scale = weight_scales(w)
    assert scale[0] == 1 and (quantize_weights(w, scale)[:, 0] == 0).all()
    assert quantize_weights(w, scale)[0, 1] * scale[1] == 1


@pytest.mark.parametrize("shape", [(384, 60), (37, 5), (1, 3), (8, 4)])
def test_bounded_weights_are_bounded_and_near(shape):
    w = normal(*shape) * np.exp(normal(shape[1]))
    scale = bounded_scales(w)
    levels = quantize_weights(w, scale)
    assert levels.dtype == np.int8 and largest_sums(levels).max() <= BOUND
    assert (np.abs(levels * scale - w) <= 0.5001 * scale).all()
    assert (scale <= 4.1 * weight_scales(w)).all()  # four alike, and their rounding


def test_weights_that_are_small_enough_keep_their_scale():
    w = normal(64, 6)
    w[3] = 50.0  # others are steps of less than 16
    w[[2, 6, 7]] = 0.0  # of the sum that it is in
    np.testing.assert_array_equal(bounded_scales(w), weight_scales(w))


@pytest.mark.parametrize("largest", [127, 16])
def test_weights_that_were_quantized_before_are_bounded_only_without_a_loss(largest):
    w = RANDOM.integers(-largest, largest + 1, (96, 12)) * np.float32(0.01)
    w[0] = largest * np.float32(0.01)
    scale = bounded_scales(w.astype("float32"))
    assert (scale is None) == (largest > BOUND / 4)
    w[:, 1:] = normal(96, 11)  # one such channel is enough
    assert (bounded_scales(w.astype("float32")) is None) == (largest > BOUND / 4)


def test_each_token_is_quantized_between_its_own_ends():
    x = normal(5, 40) * np.array([[1], [10], [0.01], [3], [0]], "float32") + 2
    quantized = quantize_input(x)
    assert quantized.levels.dtype == np.uint8
    assert (quantized.levels[:4].min(1) == 0).all() and (quantized.levels[:4].max(1) == 255).all()
    step = (x.max(1) - x.min(1)) / 255
    assert (np.abs(quantized.values() - x).max(1) <= step / 2 + 1e-6).all()


def test_static_range_clips_and_is_the_same_for_all_tokens():
    x = np.array([[-3.0, 0.1, 0.5, 9.0]], "float32")
    quantized = quantize_input(x, -1.0, 1.0)
    np.testing.assert_array_equal(quantized.levels, [[0, 140, 191, 255]])
    np.testing.assert_allclose(quantized.values(), [[-1, 25 / 255, 127 / 255, 1]], atol=1e-6)


def test_bf16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    x = np.concatenate([normal(1000) * 1e3, [1 + 2**-8, 1 + 3 * 2**-8, -0.0]]).astype("float32")
    np.testing.assert_array_equal(
        round_to_bf16(x), torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    )


def test_signal_to_noise_is_in_decibels():
    x = normal(1000)
    assert signal_to_noise(x, x * np.float32(1.1)) == pytest.approx(20, abs=1e-4)
    assert signal_to_noise(x, x) == signal_to_noise(0 * x, 0 * x) == LOSSLESS
    assert signal_to_noise(0 * x, x) == 0


def test_smoothing_changes_nothing_but_the_rounding():
    x, w = normal(50, 64), normal(64, 16)
    x[:, 3] *= 100  # an outlier channel, which costs all others their levels
    smooth = np.ones(64, "float32")
    smooth[3] = 0.03
    plain, smoothed = (
        signal_to_noise(x @ w, np.matmul(*computed(x, w, LayerPlan("int8", smooth=factors))))
        for factors in (None, smooth)
    )
    assert smoothed > plain + 2
    assert signal_to_noise(x @ w, np.matmul(*computed(x, w, LayerPlan("int8")))) == plain


def test_report_has_the_worst_output_first():
    x, w = normal(60, 32), normal(32, 8)
    outlier, unused = x.copy(), w.copy()
    outlier[:, 0] *= 100  # takes the levels of all other channels, and adds nothing
    unused[0] = 0
    plan = {
        "kept": LayerPlan("fp32", why="cost 3 points"),
        "good": LayerPlan("int8"),
        "half": LayerPlan("bf16"),
        "stored": LayerPlan("fp16"),
        "clipped": LayerPlan("int8", -0.5, 0.5),
        "bad": LayerPlan("int8"),
    }
    inputs = dict.fromkeys(plan, x) | {"bad": outlier}
    rows = layer_report(plan, dict.fromkeys(plan, w) | {"bad": unused}, inputs)
    by_name = {row["layer"]: row for row in rows}
    assert [row["layer"] for row in rows] == ["clipped", "bad", "good", "half", "stored", "kept"]
    assert by_name["kept"]["output dB"] is None and by_name["kept"]["why"] == "cost 3 points"
    assert by_name["clipped"]["range"] == "-0.5 … 0.5" and by_name["good"]["range"] == "dynamic"
    assert by_name["stored"]["input dB"] == LOSSLESS > by_name["stored"]["weight dB"] > 60
    assert 30 < by_name["good"]["input dB"] < by_name["half"]["input dB"] < 60
