"""Cuts a batch into passes, and its rows into the blocks of tokens that kernels work on."""

from __future__ import annotations

import numpy as np

from bertile.loading.errors import InputError


def passes(
    ends: np.ndarray, block_tokens: int, limit: int, step: int | None, together: bool = False
) -> list[tuple[int, int]]:
    """Cut a batch into (first row, rows): `step` rows each, or at most `limit` blocks.

    Rows that outputs mix go `together`.
    """
    if together:
        if step and len(ends) != step:
            what = f"the input has {len(ends)} rows, this bundle takes exactly {step}"
            raise InputError(f"{what}: its outputs depend on all of them")
        return [(0, len(ends))]
    if step:
        return [(first, min(step, len(ends) - first)) for first in range(0, len(ends), step)]
    starts, room = [], 0
    for row, blocks in enumerate(((ends + (block_tokens - 1)) // block_tokens).tolist()):
        if not starts or blocks > room:
            starts.append(row)
            room = limit
        room -= blocks
    return [(first, end - first) for first, end in zip(starts, [*starts[1:], len(ends)])]


def sequence_ends(attention_mask: np.ndarray) -> np.ndarray:
    """Return for each row the position behind its last non-zero entry, at least 1, as (batch,)."""
    used = np.asarray(attention_mask) != 0
    length = used.shape[1]
    return np.where(used.any(axis=1), length - used[:, ::-1].argmax(axis=1), 1)


def token_blocks(attention_mask: np.ndarray, block_tokens: int) -> np.ndarray:
    """Return the table (m, 4) int32 of the blocks of so many tokens for a (batch, length) mask.

    A line is [row of the batch, position of the block's first token, index of the first block of
    its sequence, number of blocks of its sequence]. What is behind the last token needs no block.
    """
    return blocks_of(sequence_ends(attention_mask), block_tokens)


def blocks_of(ends: np.ndarray, block_tokens: int) -> np.ndarray:
    """Return the table of `token_blocks` for sequences that end before the positions `ends`."""
    counts = (ends + (block_tokens - 1)) // block_tokens
    sequences = np.empty((len(ends), 4), np.int32)
    sequences[:, 0] = np.arange(len(ends))
    sequences[:, 2] = np.cumsum(counts) - counts
    sequences[:, 3] = counts
    table = np.repeat(sequences, counts, axis=0)
    table[:, 1] = (np.arange(len(table)) - table[:, 2]) * block_tokens
    return table
