"""Numbers that say how good, or how like another model's, the answers of a model are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracy(chosen: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of labels that are the wanted ones."""
    return float(np.mean([label == other for label, other in zip(chosen, wanted)]))


def mean_cosine(vectors: np.ndarray, wanted: np.ndarray) -> float:
    """The mean cosine of the angle between the rows of two arrays (N, C)."""
    return float((_unit(vectors) * _unit(wanted)).sum(1).mean())


def similarity_spearman(vectors: np.ndarray, wanted: np.ndarray) -> float:
    """Spearman's correlation of the cosines of all pairs of rows of one array with the other's.

    It is 1 where both order the pairs of texts alike, which is what a search needs. Arrays are
    (N, C) with at least three rows.
    """
    pairs = np.triu_indices(len(vectors), 1)
    return spearman(*((_unit(rows) @ _unit(rows).T)[pairs] for rows in (vectors, wanted)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks of two arrays (N,); equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
