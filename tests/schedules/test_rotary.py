"""Rotary positions against numpy: odd numbers of heads and channels, sequences that begin anew."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.schedules import reference
from bertile.schedules.cpu.rotary import rotary
from bertile.schedules.task import Task

TOLERANCE = 2e-6  # two products and a sum in float32


def task_of(heads, size, rest=0, **more):
    """So many heads that are turned, and channels behind them that are not."""
    shape = {"channels": heads * size + rest, "heads": heads, "head_size": size}
    return Task("rotary", {**shape, **more})


@pytest.mark.parametrize("task", [task_of(24, 64, 768), task_of(24, 32, 384)], ids=str)
def test_rotary_equals_numpy_on_bert_shapes(kernels, task):
    assert kernels.difference(task, blocks=4) < TOLERANCE


@pytest.mark.parametrize(("heads", "size", "rest"), [(1, 2, 0), (3, 26, 39), (2, 6, 1)])
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_rotary_equals_numpy_at_odd_sizes(kernels, heads, size, rest, blocks):
    assert kernels.difference(task_of(heads, size, rest), blocks) < TOLERANCE


@pytest.mark.parametrize(
    "task", [task_of(24, 128, 1024, epsilon=1e-6), task_of(3, 26, 39, epsilon=0.1)]
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_heads_are_normed_before_they_are_turned(kernels, task, blocks):
    assert kernels.difference(task, blocks) < 2 * TOLERANCE


@pytest.mark.parametrize("more", [{}, {"epsilon": 1e-6}], ids=str)
def test_attention_in_bfloat16_gets_pairs(kernels, more):
    task = task_of(3, 26, 40, writes="to_bf16", values_from=78, **more)
    assert kernels.mistake(task, 3) is None


def test_values_that_begin_elsewhere_are_refused():
    task = task_of(3, 26, 40, writes="to_bf16", values_from=52)
    with pytest.raises(ValueError, match="all of Q and K"):
        rotary.kernel(task, {}, None)


def test_reference_norms_each_head_by_itself():
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((5, 11)), rng.standard_normal((2, 4))
    normed = reference.rms_heads(x, gamma, 0.01)
    for head in range(2):
        part = x[:, 4 * head : 4 * head + 4]
        root = np.sqrt((part**2).mean(1, keepdims=True) + 0.01)
        np.testing.assert_allclose(normed[:, 4 * head : 4 * head + 4], part / root * gamma[head])
    assert np.array_equal(normed[:, 8:], x[:, 8:])


def test_reference_turns_pairs_of_channels_as_complex_numbers():
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal((5, 8)), rng.uniform(-4, 4, (5, 4))
    both = np.concatenate([angle, angle], 1)
    rotated = reference.rotary(x, np.cos(both), np.sin(both))
    turned = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angle)
    np.testing.assert_allclose(rotated, np.concatenate([turned.real, turned.imag], 1), rtol=1e-12)


def test_scores_of_turned_channels_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8))

    def score(i, j):
        turned = [
            reference.rotary(
                x, *(np.tile(f(place * 0.3 ** np.arange(4)), 2) for f in (np.cos, np.sin))
            )
            for x, place in ((q, i), (k, j))
        ]
        return turned[0] @ turned[1]

    assert np.isclose(score(3, 7), score(10, 14)) and not np.isclose(score(3, 7), score(3, 8))


def test_flops_counts_the_heads_that_are_turned():
    assert rotary.flops(task_of(2, 8, 100), 5) == 3 * 5 * 16
