"""LayerNorm in lanes against numpy, far from zero too."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.schedules import BLOCK_TOKENS, reference
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.layer_norm import layer_norm
from bertile.schedules.task import Task
from bertile.targets import rows

TOLERANCE = 1e-5  # mean and variance of about a thousand values of the size of 10


def task_of(channels, epsilon=1e-12, **more):
    return Task("layer_norm", {"channels": channels, "epsilon": epsilon, **more})


@pytest.mark.parametrize("channels", [768, 1024, 384, 312, 128, 13, 2])
@pytest.mark.parametrize("blocks", [1, 3])
def test_layer_norm_equals_numpy(kernels, channels, blocks):
    assert kernels.difference(task_of(channels), blocks) < TOLERANCE


@pytest.mark.parametrize("channels", [768, 13])
def test_rms_norm_equals_numpy(kernels, channels):
    assert kernels.difference(task_of(channels, rms=True), 3) < TOLERANCE
    narrowed = task_of(channels, rms=True, kind="int8")
    assert kernels.mistake(narrowed, 2) is None


def test_reference_of_rms_norm_takes_no_mean_off():
    x = np.array([[3.0, 4.0]])
    got = reference.layer_norm(x, np.array([1.0, 2.0]), np.zeros(2), 0.5, rms=True)
    np.testing.assert_allclose(got, x / np.sqrt(12.5 + 0.5) * [1, 2])


def test_layer_norm_equals_numpy_at_every_point_of_its_space(kernels):
    task = task_of(312)
    for sums in layer_norm.space(task, kernels.row)["sums"]:
        assert kernels.difference(task, 7, {"sums": sums}) < TOLERANCE


def test_layer_norm_keeps_its_digits_far_from_zero(kernels):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((32, 768)) + 1000).astype("float32")
    gamma, beta = np.ones(768, "float32"), np.zeros(768, "float32")
    normalized = kernels.call(
        kernels.build(task_of(768)), [lanes.to_lanes(x), gamma, beta], (2, 768, BLOCK_TOKENS)
    )
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, 1e-12)
    # float32 holds 1000 to 6e-5: as E[x²] - E[x]² the variance would be off by a tenth
    assert np.abs(lanes.from_lanes(normalized) - expected).max() < 5e-4


def test_layer_norm_adds_epsilon_to_the_variance(kernels):
    x = np.full((1, 16, BLOCK_TOKENS), 3.0, "float32")  # no variance at all
    x[0, 0] = 3.0 + 1e-3
    gamma, beta = np.ones(16, "float32"), np.full(16, 2.0, "float32")
    normalized = kernels.call(kernels.build(task_of(16, 1e-3)), [x, gamma, beta], x.shape)
    expected = reference.layer_norm(x[0].T.astype("float64"), gamma, beta, 1e-3).T
    assert np.abs(normalized[0] - expected).max() < 1e-5


@pytest.mark.parametrize("channels", [768, 312, 13])
@pytest.mark.parametrize("row", rows.TABLE, ids=lambda row: row.name)
def test_default_lies_in_its_own_space(channels, row):
    task = task_of(channels)
    assert layer_norm.valid(task, row, layer_norm.default(task, row))
