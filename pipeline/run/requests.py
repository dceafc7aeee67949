"""Draws the inputs of a request that a bundle takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from bertile.base.errors import UsageError
from bertile.run.texts import max_tokens

USUAL_LENGTH = 128  # tokens of a request where nobody says how many


def usual_length(manifest: dict[str, Any]) -> int:
    """The tokens of a request where nobody says how many: 128, or as many as the model takes."""
    static = manifest["static"].get("length")
    return static or min(USUAL_LENGTH, max_tokens(manifest) or USUAL_LENGTH)


def random_inputs(manifest: dict[str, Any], batch: int, length: int) -> dict[str, np.ndarray]:
    """Seeded ids for every input of the manifest; no padding, as a full batch has none."""
    limit = max_tokens(manifest)
    if limit and length > limit:
        raise UsageError(f"length {length} is too much", f"the model takes at most {limit} tokens")
    random = np.random.default_rng(batch * 100003 + length)
    inputs = {}
    for spec in manifest["inputs"]:
        if spec["default"] is None:
            values = random.integers(0, spec["below"] or 2, (batch, length))
        else:
            values = np.full((batch, length), int(spec["default"] == "ones"))
        inputs[spec["name"]] = values.astype(spec["dtype"])
    return inputs
