"""Says how alike vectors are, as the directory of a model has them compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertile.base.errors import InputError
from bertile.text.sparse_vectors import SparseVector

# Of the vectors of tokens: the sum of each token's best match.
MAXSIM = "maxsim"


def between_all(name: str, first: Any, second: Any) -> np.ndarray:
    """(n, m) float32 of n and m vectors, or of n and m texts' vectors of tokens ("maxsim").

    The larger the more alike: distances are negative, as sentence-transformers has them.
    """
    if name == MAXSIM:
        first, second = _several(first), _several(second)
        rows = [[_best_matches(a, b) for b in second] for a in first]
        return np.asarray(rows, np.float32).reshape(len(first), len(second))
    a, b = _rows(first, second)
    if name == "cosine":
        return _unit(a) @ _unit(b).T
    if name == "dot":
        return a @ b.T
    if name == "euclidean":
        # in twice the precision: of vectors that are nearly the same, the terms cancel out
        a, b = a.astype(np.float64), b.astype(np.float64)
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * (a @ b.T)
        return -np.sqrt(np.maximum(squares, 0)).astype(np.float32)
    # a row at a time: all differences at once would be (n, m, d)
    distances = [np.abs(row - b).sum(1) for row in a]
    return -np.asarray(distances, np.float32).reshape(len(a), len(b))


def between_pairs(name: str, first: Any, second: Any) -> np.ndarray:
    """(n,) float32 of n vectors and n others; as `between_all`."""
    if name == MAXSIM:
        pairs = zip(_several(first), _several(second))
        return np.asarray([_best_matches(a, b) for a, b in pairs], np.float32)
    a, b = _rows(first, second)
    if name == "cosine":
        return (_unit(a) * _unit(b)).sum(1)
    if name == "dot":
        return (a * b).sum(1)
    if name == "euclidean":
        return -np.linalg.norm(a - b, axis=1)
    return -np.abs(a - b).sum(1)


def _best_matches(query: np.ndarray, document: np.ndarray) -> float:
    return float((query @ document.T).max(axis=1).sum())


def _several(vectors: Any) -> list[np.ndarray]:
    """The (tokens, d) of each text; an array of two axes is those of a single text."""
    if getattr(vectors, "ndim", 0) == 2:
        vectors = [vectors]
    return [np.asarray(vector, np.float32) for vector in vectors]


def _rows(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as (n, d) and (m, d) float32; of sparse vectors the places alone where any has a weight,
    which are few of a vocabulary and all that counts.
    """
    several = [_sparse(vectors) for vectors in (first, second)]
    if None in several:
        return _dense(first), _dense(second)
    sizes = {vector.size for vectors in several for vector in vectors}
    if len(sizes) > 1:
        raise InputError(
            f"the vectors are of different sizes: {', '.join(map(str, sorted(sizes)))}"
        )
    places = np.unique(np.concatenate([v.indices for vectors in several for v in vectors]))
    a, b = (_at(places, vectors) for vectors in several)
    return a, b


def _sparse(vectors: Any) -> list[SparseVector] | None:
    """Sparse vectors as a list; None for vectors of another kind."""
    if isinstance(vectors, SparseVector):
        return [vectors]
    several = isinstance(vectors, Sequence) and len(vectors) > 0
    return list(vectors) if several and isinstance(vectors[0], SparseVector) else None


def _at(places: np.ndarray, vectors: list[SparseVector]) -> np.ndarray:
    rows = np.zeros((len(vectors), len(places)), np.float32)
    for row, vector in zip(rows, vectors):
        row[np.searchsorted(places, vector.indices)] = vector.values
    return rows


def _dense(vectors: Any) -> np.ndarray:
    if (sparse := _sparse(vectors)) is not None:
        return np.stack([vector.dense() for vector in sparse])
    array = np.asarray(vectors, np.float32)
    return array[None] if array.ndim == 1 else array


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
