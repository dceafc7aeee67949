"""Says how alike vectors are, as the directory of a model has them compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertile.text.sparse_vectors import SparseVector

NAMES = ("cosine", "dot", "euclidean", "manhattan")


def between_all(name: str, first: Any, second: Any) -> np.ndarray:
    """(n, m) float32 of n and m vectors; of tokens' vectors, the sum of each token's best match.

    The larger the more alike: distances are negative, as sentence-transformers has them.
    """
    if _is_of_tokens(first):
        first, second = _several(first), _several(second)
        rows = [[float((a @ b.T).max(axis=1).sum()) for b in second] for a in first]
        return np.asarray(rows, np.float32)
    a, b = _rows(first), _rows(second)
    if name == "cosine":
        return _unit(a) @ _unit(b).T
    if name == "dot":
        return a @ b.T
    if name == "euclidean":
        a, b = a.astype(np.float64), b.astype(np.float64)  # else 3e-4 is left between equal vectors
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * (a @ b.T)
        return -np.sqrt(np.maximum(squares, 0)).astype(np.float32)
    # a row at a time: all differences at once would be (n, m, d)
    return np.stack([-np.abs(row - b).sum(1) for row in a]) if len(a) else np.empty((0, len(b)))


def between_pairs(name: str, first: Any, second: Any) -> np.ndarray:
    """(n,) float32 of n vectors and n others; as `between_all`."""
    if _is_of_tokens(first):
        pairs = zip(_several(first), _several(second))
        return np.asarray([float((a @ b.T).max(axis=1).sum()) for a, b in pairs], np.float32)
    a, b = _rows(first), _rows(second)
    if name == "cosine":
        return (_unit(a) * _unit(b)).sum(1)
    if name == "dot":
        return (a * b).sum(1)
    if name == "euclidean":
        return -np.linalg.norm(a - b, axis=1)
    return -np.abs(a - b).sum(1)


def _is_of_tokens(vectors: Any) -> bool:
    """Whether these are the vectors of tokens: a list of (tokens, d), or of a single text."""
    if isinstance(vectors, Sequence) and not isinstance(vectors, SparseVector) and len(vectors):
        return getattr(vectors[0], "ndim", 0) == 2
    return False


def _several(vectors: Any) -> list[np.ndarray]:
    return [np.asarray(vector) for vector in vectors]


def _rows(vectors: Any) -> np.ndarray:
    if isinstance(vectors, SparseVector):
        return vectors.dense()[None]
    if isinstance(vectors, Sequence) and len(vectors) and isinstance(vectors[0], SparseVector):
        return np.stack([vector.dense() for vector in vectors])
    array = np.asarray(vectors, np.float32)
    return array[None] if array.ndim == 1 else array


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
