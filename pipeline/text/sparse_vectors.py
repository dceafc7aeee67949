"""Holds vectors of the size of a vocabulary with few weights that are not zero, as SPLADE has."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class SparseVector(NamedTuple):
    """The places (n,) int32, in ascending order, and weights (n,) float32 of `size` numbers."""

    indices: np.ndarray
    values: np.ndarray
    size: int

    def dense(self) -> np.ndarray:
        """All `size` numbers, float32."""
        vector = np.zeros(self.size, np.float32)
        vector[self.indices] = self.values
        return vector

    def dot(self, other: SparseVector) -> float:
        """The sum of the products of the weights in the same places."""
        _, mine, theirs = np.intersect1d(
            self.indices, other.indices, assume_unique=True, return_indices=True
        )
        return float(self.values[mine] @ other.values[theirs])

    @classmethod
    def of(cls, vector: np.ndarray, most: int | None = None) -> SparseVector:
        """What of a vector (size,) is above zero; of more than `most`, the largest."""
        indices = np.flatnonzero(vector > 0)
        if most is not None and len(indices) > most:
            indices = np.sort(indices[np.argsort(-vector[indices], kind="stable")[:most]])
        return cls(indices.astype(np.int32), vector[indices].astype(np.float32), len(vector))

    def __repr__(self) -> str:
        return f"SparseVector({len(self.indices)} of {self.size})"

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, SparseVector)
            and self.size == other.size
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.values, other.values)
        )

    def __ne__(self, other: Any) -> bool:  # which a tuple has of its own
        return not self == other

    __hash__ = None  # type: ignore[assignment]
