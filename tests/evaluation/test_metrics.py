"""Metrics against values worked out by hand and by other formulas."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.evaluation.metrics import accuracy, mean_cosine, similarity_spearman, spearman

RANDOM = np.random.default_rng(5)


def test_accuracy_is_the_share_of_equal_labels():
    assert accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"]) == 0.75


def test_mean_cosine_ignores_lengths():
    a = np.array([[1.0, 0.0], [3.0, 4.0]])
    assert mean_cosine(a, a * [[5], [0.1]]) == pytest.approx(1)
    assert mean_cosine(a, np.array([[0.0, 2.0], [4.0, 3.0]])) == pytest.approx((0 + 24 / 25) / 2)


def test_spearman_is_the_formula_of_rank_differences():
    a, b = RANDOM.permutation(50).astype(float), RANDOM.permutation(50).astype(float)
    formula = 1 - 6 * np.sum((a - b) ** 2) / (50 * (50**2 - 1))
    assert spearman(np.exp(a / 10), b**3) == pytest.approx(formula)


def test_spearman_shares_the_ranks_of_equal_values():
    # ranks 1.5 1.5 3 4 against 1 2 3 4
    assert spearman(np.array([5, 5, 6, 7]), np.array([1, 2, 3, 4])) == pytest.approx(
        4.5 / np.sqrt(4.5 * 5)
    )


def test_similarity_spearman_sees_the_order_of_pairs_alone():
    a = RANDOM.standard_normal((20, 8))
    turned = np.linalg.qr(RANDOM.standard_normal((8, 8)))[0]
    assert similarity_spearman(a @ turned, 3 * a) == pytest.approx(1)
    assert abs(similarity_spearman(a, RANDOM.standard_normal((20, 8)))) < 0.4


def test_a_little_noise_costs_a_little():
    a = RANDOM.standard_normal((50, 64))
    noisy = a + 0.1 * RANDOM.standard_normal(a.shape)
    assert 0.98 < mean_cosine(a, noisy) < 0.999
    assert 0.97 < similarity_spearman(a, noisy) < 0.9999
