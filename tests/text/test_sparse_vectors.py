"""A sparse vector holds what of a vector is above zero."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.text.sparse_vectors import SparseVector

VECTOR = np.array([0, 2.0, -1, 0.5, 0, 2, 3], np.float32)


def test_vector_and_its_places_are_the_same() -> None:
    sparse = SparseVector.of(VECTOR)
    assert sparse.indices.tolist() == [1, 3, 5, 6]
    assert (sparse.indices.dtype, sparse.values.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(sparse.dense(), np.maximum(VECTOR, 0))
    assert repr(sparse) == "SparseVector(4 of 7)"


@pytest.mark.parametrize(
    ("most", "kept"), [(1, [6]), (2, [1, 6]), (3, [1, 5, 6]), (9, [1, 3, 5, 6])]
)
def test_the_largest_are_kept_in_order_of_place(most, kept) -> None:
    assert SparseVector.of(VECTOR, most).indices.tolist() == kept


def test_dot_is_that_of_the_dense_vectors() -> None:
    rng = np.random.default_rng(1)
    first, second = np.maximum(rng.standard_normal((2, 50)).astype(np.float32), 0)
    got = SparseVector.of(first).dot(SparseVector.of(second))
    assert got == pytest.approx(float(first @ second), rel=1e-6)
    assert SparseVector.of(np.zeros(50, np.float32)).dot(SparseVector.of(first)) == 0


def test_vectors_are_equal_by_what_they_hold() -> None:
    assert SparseVector.of(VECTOR) == SparseVector.of(VECTOR.copy())
    assert SparseVector.of(VECTOR) != SparseVector.of(VECTOR, 2)
    assert SparseVector.of(VECTOR) != SparseVector.of(np.append(VECTOR, 0))
    assert SparseVector.of(VECTOR) != "a vector"
