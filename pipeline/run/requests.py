"""Draws the inputs of a request that a bundle takes, with padding or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertile.base.errors import UsageError
from bertile.text.tokens import max_tokens

USUAL_LENGTH = 128  # tokens of a request where nobody says how many


def usual_length(manifest: dict[str, Any], wish: int = USUAL_LENGTH) -> int:
    """The tokens of a request where nobody says how many: 128 (or the `wish`), or as many as the
    model takes.
    """
    static = manifest["static"].get("length")
    return static or min(wish, max_tokens(manifest) or wish)


def padded_inputs(manifest: dict[str, Any], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Seeded ids for sequences of these lengths, each (sequences, longest); zeros are padding.

    Raises UsageError for a length that the model does not take, and for padding where it has no
    attention_mask.
    """
    longest = int(max(lengths))
    inputs = random_inputs(manifest, len(lengths), longest)
    if min(lengths) == longest:
        return inputs
    if "attention_mask" not in inputs:
        raise UsageError(
            "the model has no attention_mask, so that a request cannot have padding",
            "give sequences of one length, or single ones",
        )
    padding = np.arange(longest) >= np.asarray(lengths)[:, None]
    return {name: np.where(padding, 0, array).astype(array.dtype) for name, array in inputs.items()}


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
