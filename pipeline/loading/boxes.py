"""Takes the boxes that tokens have on a page apart, into an input for each side."""

from __future__ import annotations

import numpy as np

from bertile.loading.errors import InputError

BOXES = "bbox"  # (batch, length, 4): the left, the upper, the right and the lower side of each
SIDES = ("bbox_left", "bbox_top", "bbox_right", "bbox_bottom")


def sides(inputs: dict, specs: list[dict]) -> dict:
    """The inputs with `bbox`, (batch, length, 4), as four of (batch, length), for a model of these.

    Rows may be of unequal lengths. Raises InputError for boxes of another form, and for a side that
    is given beside them.
    """
    if BOXES not in inputs or SIDES[0] not in (spec["name"] for spec in specs):
        return inputs
    others = {name: value for name, value in inputs.items() if name != BOXES}
    boxes = inputs[BOXES]
    if boxes is None:
        return others
    twice = [name for name in SIDES if others.get(name) is not None]
    if twice:
        raise InputError(f"{twice[0]} is given beside {BOXES}, which has it", "give one of both")
    try:
        rows = [np.asarray(row) for row in boxes]
    except (TypeError, ValueError) as error:
        raise InputError(f"{BOXES} cannot be read as an array: {error}") from error
    if not all(row.ndim == 2 and row.shape[1] == len(SIDES) for row in rows):
        raise InputError(f"{BOXES} is not (batch, length, {len(SIDES)})", "give a box each token")
    parts = ([row[:, place] for row in rows] for place in range(len(SIDES)))
    return {**others, **dict(zip(SIDES, parts))}


def check_boxes(arrays: dict) -> None:
    """Raise InputError for a box whose right side is left of its left one, or lower above upper."""
    for first, last in (SIDES[::2], SIDES[1::2]):
        if first in arrays and last in arrays and (arrays[last] < arrays[first]).any():
            row, column = np.argwhere(arrays[last] < arrays[first])[0]
            what = f"{arrays[last][row, column]} is less than the {arrays[first][row, column]}"
            raise InputError(f"{last}[{row}, {column}] is wrong: {what} of {first}")
