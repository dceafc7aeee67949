"""Runs tokenized texts together: rows of a batch, padded to the longest of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.text.tokens import FIELDS

Outputs = dict[str, np.ndarray]
# Of a call at most: so many that what it costs beside the model is little of it. At least a pass.
CALL_BLOCKS, PASS_BLOCKS = 32, 8
# Of a window, for each place: the last call that runs keeps the other places waiting.
CALLS_EACH = 8


def blocks(encoding: Any) -> int:
    """How many blocks of tokens a text takes."""
    return -(-len(encoding) // BLOCK_TOKENS)


def call_blocks(encodings: Sequence[Any], places: int) -> int:
    """How many blocks a call should have of these texts, where `places` calls run at a time."""
    share = sum(map(blocks, encodings)) // (CALLS_EACH * places)
    return min(CALL_BLOCKS, max(PASS_BLOCKS, share))


def groups(encodings: Sequence[Any], most: int, padded: bool = True) -> Iterator[list[int]]:
    """Indices of texts to run together, the longest first: of at most `most` blocks, with padding.

    Where rows cannot be `padded`, all of a group are equally long.
    """
    order = sorted(range(len(encodings)), key=lambda index: -len(encodings[index]))
    group: list[int] = []
    for index in order:
        if group:
            first = encodings[group[0]]
            full = (len(group) + 1) * blocks(first) > most
            if full or (not padded and len(encodings[index]) != len(first)):
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def run(model: Any, encodings: Sequence[Any]) -> list[Outputs]:
    """The outputs of one call for each text; those by token are as long as the longest text.

    `model` is called with arrays (batch, length) by the names of `model.inputs`.
    """
    # a tokenizer that puts nothing around a text makes nothing of an empty one
    length = max(1, *map(len, encodings))
    names = [name for name in model.inputs if name in FIELDS]  # the loader fills what no text says
    rows = [
        [_padded(getattr(encoding, FIELDS[name]), length) for encoding in encodings]
        for name in names
    ]
    results = model(**dict(zip(names, np.array(rows, np.int64))))  # one array: few calls of numpy
    return [{name: array[row] for name, array in results.items()} for row in range(len(encodings))]


def _padded(numbers: list[int], length: int) -> list[int]:
    return numbers + [0] * (length - len(numbers))


def run_all(model: Any, encodings: Sequence[Any], most: int = CALL_BLOCKS) -> list[Outputs]:
    """The outputs for each text in their order, one call after the other."""
    outputs: list[Outputs] = [{} for _ in encodings]
    for group in groups(encodings, most, "attention_mask" in model.inputs):
        for index, row in zip(group, run(model, [encodings[index] for index in group])):
            outputs[index] = row
    return outputs
