"""Weights rounded with what is known of the inputs: the layer's output is nearer."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.four_bit import quantize_groups
from bertile.quantize import gptq

RANDOM = np.random.default_rng(3)


def correlated(tokens: int, inputs: int) -> np.ndarray:
    """Inputs of few directions, as in a trained network."""
    few = RANDOM.standard_normal((tokens, max(1, inputs // 6)))
    x = few @ RANDOM.standard_normal((few.shape[1], inputs))
    return (x + 0.1 * RANDOM.standard_normal(x.shape)).astype("float32")


def loss(x: np.ndarray, w: np.ndarray, values: np.ndarray) -> float:
    return float(np.linalg.norm(x @ w - x @ values) / np.linalg.norm(x @ w))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("inputs", [64, 300, 37])
def test_output_is_nearer_than_by_rounding_to_nearest(inputs, size):
    x = correlated(2000, inputs)
    w = RANDOM.standard_normal((inputs, 24)).astype("float32")
    mine = gptq.quantize(w, x.T @ x, size)
    nearest = quantize_groups(w, size)
    assert loss(x, w, mine.values()) < 0.75 * loss(x, w, nearest.values())
    assert mine.levels.shape == nearest.levels.shape and mine.scales.shape == nearest.scales.shape


def test_inputs_that_do_not_go_together_are_rounded_to_nearest():
    w = RANDOM.standard_normal((96, 7)).astype("float32")
    mine = gptq.quantize(w, np.eye(96, dtype="float32"), 32)
    np.testing.assert_array_equal(mine.values(), quantize_groups(w, 32).values())


def test_inputs_that_were_never_seen_do_no_harm():
    w = RANDOM.standard_normal((64, 5)).astype("float32")
    x = correlated(400, 64)
    x[:, 10:20] = 0
    values = gptq.quantize(w, x.T @ x, 32).values()
    assert np.abs(values - w).max() < 2.0  # no weight is driven off
    nothing = gptq.quantize(w, np.zeros((64, 64), "float32"), 32).values()
    np.testing.assert_array_equal(nothing, quantize_groups(w, 32).values())
