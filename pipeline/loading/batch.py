"""Plans a batch: where its rows end, and the passes through the model that it takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bertile.loading.blocks import BLOCK_TOKENS, blocks_of, passes, sequence_ends
from bertile.loading.errors import InputError

KEPT = 16  # plans


class Pass(NamedTuple):
    """Rows from `first` on, `count` of them, computed as an array of the shape `room`.

    `table` are its blocks, (m, 4) int32, see `token_blocks`.
    """

    first: int
    count: int
    room: tuple[int, int]
    table: np.ndarray


class Batch(NamedTuple):
    """Where each row ends, as (batch,), and the passes; nobody writes into them.

    It is `whole` where one pass has its very shape and all rows are full: nothing is to be cut.
    """

    ends: np.ndarray
    passes: list[Pass]
    whole: bool


class Planner:
    """Plans batches of a model; those of full rows have one plan a shape, which is kept.

    `static` is the manifest's; a model without a mask is `maskless`: it cannot tell what is
    padding.
    """

    def __init__(self, static: dict, maskless: bool):
        self._step, self._width = static.get("batch"), static.get("length")
        self._together, self._padded = static.get("together", False), static.get("padded", False)
        self._exact = self._padded or maskless
        self._kept: dict[tuple[int, int, int], Batch] = {}

    def plan(self, shape: tuple[int, int], mask: np.ndarray | None, limit: int) -> Batch:
        """Return the plan for (batch, length) and a mask of it, with passes of `limit` blocks.

        Raises InputError for a length or a batch that a model of static shapes does not take.
        """
        if mask is None or self._padded or np.count_nonzero(mask) == mask.size:
            mask = None  # all rows are full
            kept = self._kept.get((*shape, limit))
            if kept is not None:
                return kept
        batch = self._plan(shape, mask, limit)
        if mask is None and len(batch.passes) == 1:  # several take so long that a plan is nothing
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[(*shape, limit)] = batch
        return batch

    def _plan(self, shape: tuple[int, int], mask: np.ndarray | None, limit: int) -> Batch:
        rows, length = shape
        width = self._width or length
        if length > width or (length < width and self._exact):
            exactly = "at most" if length > width else "exactly"
            raise InputError(f"the input has {length} tokens, this bundle takes {exactly} {width}")
        ends = np.full(rows, length) if mask is None else sequence_ends(mask)
        planned = []
        for first, count in passes(ends, BLOCK_TOKENS, limit, self._step, self._together):
            room = (self._step or count, width)
            last = np.ones(room[0], np.int64)
            last[:count] = ends[first : first + count]
            planned.append(Pass(first, count, room, blocks_of(last, BLOCK_TOKENS)))
        whole = mask is None and len(planned) == 1 and planned[0].room == shape
        return Batch(ends, planned, whole)
