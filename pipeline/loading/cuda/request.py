"""Checks the arrays of one call, and cuts them into the passes that they take."""

from __future__ import annotations

import numpy as np

from bertile.loading.about import padding_id
from bertile.loading.batch import Pass, Planner
from bertile.loading.inputs import check_inputs, filled

# Of one pass through the model; a longer batch takes several. 65536 tokens fill every card, and
# twice as many would only double the memory that activations take.
PASS_BLOCKS = 4096


class Request:
    """Checked arrays of one call, and the passes that they take."""

    def __init__(self, inputs: dict, manifest: dict, max_length: int | None):
        specs = manifest["inputs"]
        checked = check_inputs(inputs, specs, max_length, padding_id(manifest))
        shape = next(iter(checked.values())).shape
        maskless = "attention_mask" not in (spec["name"] for spec in specs)
        planner = Planner(manifest["static"], maskless)
        batch = planner.plan(shape, checked.get("attention_mask"), PASS_BLOCKS)
        self.length, self.ends, self.passes = shape[1], batch.ends, batch.passes
        self._values = [checked.get(spec["name"], filled(spec["default"], shape)) for spec in specs]

    def fill(self, views: list[np.ndarray], chosen: Pass) -> None:
        """Write a pass into the staging memory: what the rows lack is 0."""
        first, count = chosen.first, chosen.count
        for view, value in zip(views, self._values):
            if not isinstance(value, int):
                value = value[first : first + count]
            if view.shape != (count, self.length):
                view.fill(0)
            view[:count, : self.length] = value
        views[-1][...] = chosen.table
