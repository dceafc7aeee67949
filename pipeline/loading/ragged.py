"""Pads rows of unequal lengths to one length, and warns of padding that nothing marks."""

from __future__ import annotations

import warnings

import numpy as np

from bertile.loading.errors import InputError

MASK = "attention_mask"


def squared(inputs: dict, specs: list[dict]) -> dict:
    """The inputs with rows of unequal lengths padded with 0, which attention_mask says.

    Raises InputError for a model without that input, for rows of different inputs that differ in
    their lengths, and for a row without tokens.
    """
    ragged = {name: rows for name, rows in inputs.items() if _is_ragged(rows)}
    if not ragged:
        return inputs
    first, lengths = next((name, [len(row) for row in rows]) for name, rows in ragged.items())
    if MASK not in (spec["name"] for spec in specs):
        raise InputError(
            f"{first} has rows of unequal lengths, and the model has no {MASK}",
            "call it with rows of one length",
        )
    real = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    padded = {name: _padded(name, rows, lengths, real, first) for name, rows in ragged.items()}
    if inputs.get(MASK) is None:
        padded[MASK] = real
    return {**inputs, **padded}


def warn_of_padding(ids: np.ndarray, padding_id: int) -> None:
    """Warn of rows (batch, length) that begin or end with padding, since no mask was given."""
    ends = (ids.item(0, 0), ids.item(0, -1)) if len(ids) == 1 else ids[:, (0, -1)]
    if padding_id in ends:
        warnings.warn(
            f"input_ids have padding (id {padding_id}) and there is no {MASK}: it is read as text;"
            f" give the {MASK}, or rows of unequal lengths without padding",
            stacklevel=4,
        )


def _is_ragged(rows) -> bool:
    if not isinstance(rows, (list, tuple)) or not rows:
        return False
    if not all(isinstance(row, (list, tuple, np.ndarray)) for row in rows):
        return False
    return len({len(row) for row in rows if not isinstance(row, np.ndarray) or row.ndim == 1}) > 1


def _padded(name: str, rows, lengths: list[int], real: np.ndarray, first: str) -> np.ndarray:
    if [len(row) for row in rows] != lengths:
        raise InputError(f"the rows of {name} are not as long as those of {first}")
    if 0 in lengths:
        raise InputError(f"{name}[{lengths.index(0)}] has no token", "give at least one")
    try:
        values = np.concatenate([np.asarray(row) for row in rows])
    except ValueError as error:
        raise InputError(f"{name} is not rows of numbers: {error}") from error
    if values.ndim != 1:
        raise InputError(f"{name} has more than two dimensions", "give (batch, length)")
    padded = np.zeros(real.shape, values.dtype)
    padded[real] = values
    return padded
