"""Runs a classifier stage by stage, and lets the texts of a batch leave whose answer is sure.

A stage gives the states of some layers, in blocks of tokens, and the logits of the head behind
them. The texts that stay are packed: their blocks move together, and the next stage sees no
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertile.loading.errors import InputError
from bertile.loading.memory import empty

LAYERS = "layers"  # the output that says how many encoder layers each text went through
Thresholds = tuple[float, ...]  # of each head but the last


class Left(NamedTuple):
    """The logits (rows, labels) by which texts left, and at which stage, from 0, (rows,) int64."""

    logits: np.ndarray
    stages: np.ndarray


def thresholds(asked: float | Sequence[float] | None, exits: dict | None) -> Thresholds | None:
    """The confidence above which a text leaves, for each early head; None: all run to the end.

    `exits` is the manifest's; what is asked for is one number for all heads, or one for each.
    Raises InputError for what it cannot be.
    """
    if exits is None:
        if asked is None:
            return None
        raise InputError(
            "exit_threshold is for a bundle with early heads",
            "compile the model with --exit-threshold",
        )
    asked = exits["threshold"] if asked is None else asked
    if asked is None:
        return None
    count = len(exits["stages"]) - 1
    values = np.broadcast_to(np.asarray(asked, np.float64), (count,)) if _fits(asked, count) else ()
    if not len(values) or np.isnan(values).any():
        raise InputError(
            f"exit_threshold is {asked!r}", f"give a number from 0 to 1, or {count} of them"
        )
    return tuple(map(float, values))


def leaving_at(stage: int, exits: dict) -> Thresholds:
    """The thresholds by which every text leaves at a stage, counted from 0."""
    heads = len(exits["stages"]) - 1
    return (np.inf,) * stage + (-np.inf,) * (heads - stage)


def confidence(logits: np.ndarray) -> np.ndarray:
    """The probability of the likeliest label of logits (rows, labels), (rows,)."""
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)


def run_stages(
    stage: Callable[[int, list, np.ndarray, int, list], tuple[list[np.ndarray], np.ndarray]],
    limits: Thresholds,
    values: list,
    table: np.ndarray,
    rows: int,
) -> Left:
    """Run a pass of `rows` texts as far as each needs.

    `stage` is called with its number, values (rows, length) and the blocks (see `token_blocks`) of
    the texts that are left, their number, and the states (blocks, …) that the stage before gave. It
    gives the next states, valid until it is called again, and the logits.
    """
    places, states = np.arange(rows), []
    leaves = Left(np.empty(0), np.empty(rows, np.int64))
    for number, limit in enumerate((*limits, -np.inf)):
        states, logits = stage(number, values, table, len(places), states)
        sure = confidence(logits) > limit
        if number == 0:
            leaves = leaves._replace(logits=np.empty((rows, logits.shape[1]), logits.dtype))
        leaves.logits[places[sure]], leaves.stages[places[sure]] = logits[sure], number
        stay = ~sure
        if not stay.any():
            break
        if sure.any():
            places = places[stay]
            values = [v if isinstance(v, int) else v[stay] for v in values]
            blocks = stay[table[:, 0]]
            table, states = (
                without_others(table, stay),
                [_picked(state, blocks) for state in states],
            )
    return leaves


def without_others(table: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The table of blocks of the rows that stay, (rows,) bool, whose blocks move together."""
    blocks = stay[table[:, 0]]
    kept = table[blocks]
    kept[:, 0] = (np.cumsum(stay) - 1)[kept[:, 0]]
    kept[:, 2] = (np.cumsum(blocks) - 1)[kept[:, 2]]
    return kept


def _fits(asked: Any, count: int) -> bool:
    numbers = [asked] if isinstance(asked, (int, float)) else asked
    if not isinstance(numbers, (list, tuple)) or len(numbers) not in (1, count):
        return False
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)


def _picked(state: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The chosen blocks of a state, in memory that a kernel reads."""
    picked = empty((int(np.count_nonzero(blocks)), *state.shape[1:]), str(state.dtype))
    return np.compress(blocks, state, axis=0, out=picked)
