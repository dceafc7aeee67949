"""Similarities are those of sentence-transformers' functions, of tokens and sparse vectors too."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.base.errors import InputError
from bertile.text import similarities
from bertile.text.sparse_vectors import SparseVector

RNG = np.random.default_rng(0)
FIRST = RNG.standard_normal((4, 6)).astype(np.float32)
SECOND = RNG.standard_normal((3, 6)).astype(np.float32)
FUNCTIONS = {
    "cosine": ("cos_sim", "pairwise_cos_sim"),
    "dot": ("dot_score", "pairwise_dot_score"),
    "euclidean": ("euclidean_sim", "pairwise_euclidean_sim"),
    "manhattan": ("manhattan_sim", "pairwise_manhattan_sim"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_similarities_are_those_of_the_original(name) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    every, pairs = (getattr(util, function) for function in FUNCTIONS[name])
    near = FIRST + np.float32(1e-5)
    for first, second in ((FIRST, SECOND), (FIRST[0], SECOND), (list(FIRST), near)):
        got, want = similarities.between_all(name, first, second), every(first, second).numpy()
        assert (got.dtype, got.shape) == (np.float32, want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got, want = similarities.between_pairs(name, FIRST[:3], SECOND), pairs(FIRST[:3], SECOND)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


def test_distance_of_what_is_nearly_the_same_keeps_its_digits() -> None:
    """Of which the square is lost in the squares of the vectors, in a float's precision."""
    near = FIRST.copy()
    near[:, 0] += 1e-4
    got = similarities.between_all("euclidean", FIRST, near).diagonal()
    np.testing.assert_allclose(got, -np.abs(near - FIRST)[:, 0], rtol=1e-3)


@pytest.mark.parametrize("name", [*FUNCTIONS, "maxsim"])
def test_no_vectors_give_no_similarities(name) -> None:
    none = [] if name == "maxsim" else np.empty((0, 6), np.float32)
    rows = [FIRST, FIRST, FIRST] if name == "maxsim" else SECOND
    for first, second, shape in ((none, rows, (0, 3)), (rows, none, (3, 0))):
        got = similarities.between_all(name, first, second)
        assert (got.shape, got.dtype) == (shape, np.float32)


def test_texts_of_tokens_are_compared_by_their_best_matches() -> None:
    util = pytest.importorskip("sentence_transformers.util.similarity")
    torch = pytest.importorskip("torch")
    texts, others = [FIRST, FIRST[:2]], [SECOND, SECOND[:1], FIRST]
    tensors = [[torch.from_numpy(rows) for rows in side] for side in (texts, others)]
    want = util.maxsim(*tensors).numpy()
    got = similarities.between_all("maxsim", texts, others)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    single = similarities.between_all("maxsim", FIRST, others)  # as encode gives a single text's
    np.testing.assert_allclose(single, want[:1], rtol=1e-5)
    pairs = similarities.between_pairs("maxsim", texts, others[:2])
    np.testing.assert_allclose(pairs, want[[0, 1], [0, 1]], rtol=1e-5)


def test_sparse_vectors_are_compared_as_dense_ones() -> None:
    dense = [np.maximum(FIRST, 0), np.maximum(SECOND, 0)]
    sparse = [[SparseVector.of(row) for row in rows] for rows in dense]
    for name in FUNCTIONS:
        want = similarities.between_all(name, *dense)
        np.testing.assert_allclose(similarities.between_all(name, *sparse), want, rtol=1e-6)
        single = similarities.between_all(name, sparse[0][0], sparse[1])
        np.testing.assert_allclose(single, want[:1], rtol=1e-6)


def test_sparse_vectors_of_different_sizes_are_refused() -> None:
    first, second = SparseVector.of(FIRST[0]), SparseVector.of(FIRST[0][:5])
    with pytest.raises(InputError, match="different sizes: 5, 6"):
        similarities.between_all("dot", first, second)
