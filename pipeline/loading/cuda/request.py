"""Checks the arrays of one call, and cuts them into the passes that they take."""

from __future__ import annotations

import numpy as np

from bertile.loading.blocks import BLOCK_TOKENS, blocks_of, passes, sequence_ends
from bertile.loading.errors import InputError
from bertile.loading.inputs import check_inputs, filled

# Of one pass through the model; a longer batch takes several. 65536 tokens fill every card, and
# twice as many would only double the memory that activations take.
PASS_BLOCKS = 4096


class Request:
    """Checked arrays of one call, and the passes that they take."""

    def __init__(self, inputs: dict, manifest: dict, max_length: int | None):
        self._specs, static = manifest["inputs"], manifest["static"]
        checked = check_inputs(inputs, self._specs, max_length)
        batch, self.length = next(iter(checked.values())).shape
        self._step, self._width = static.get("batch"), static.get("length") or self.length
        mask = None if static.get("padded") else checked.get("attention_mask")
        exact = static.get("padded") or "attention_mask" not in (
            spec["name"] for spec in self._specs
        )
        if self.length > self._width or (self.length < self._width and exact):
            at_most = "at most" if self.length > self._width else "exactly"
            raise InputError(
                f"the input has {self.length} tokens, this bundle takes {at_most} {self._width}"
            )
        self.ends = np.full(batch, self.length) if mask is None else sequence_ends(mask)
        self._values = [
            checked.get(spec["name"], filled(spec["default"], (batch, self.length)))
            for spec in self._specs
        ]
        together = static.get("together", False)
        self.passes = passes(self.ends, BLOCK_TOKENS, PASS_BLOCKS, self._step, together)

    def room(self, first: int, count: int) -> tuple[tuple[int, int], np.ndarray]:
        """The (batch, length) of a pass, and its table of blocks."""
        ends = np.ones(self._step or count, np.int64)
        ends[:count] = self.ends[first : first + count]
        return (len(ends), self._width), blocks_of(ends, BLOCK_TOKENS)

    def fill(self, views: list[np.ndarray], first: int, count: int, table: np.ndarray) -> None:
        """Write a pass into the staging memory: what the rows lack is 0."""
        for view, value in zip(views, self._values):
            if not isinstance(value, int):
                value = value[first : first + count]
            if view.shape != (count, self.length):
                view.fill(0)
            view[:count, : self.length] = value
        views[-1][...] = table
