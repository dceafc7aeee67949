"""Measures how many tokens a call needs, until more would not make it faster for each token."""

from __future__ import annotations

import time
from typing import Any

from bertile.loading.blocks import BLOCK_TOKENS
from bertile.text.tokens import Ids

BLOCKS = (16, 32, 64)  # of calls that are tried
TEXT_TOKENS = 2 * BLOCK_TOKENS
# Of the best rate: a smaller call that comes so near keeps nobody waiting for the larger.
NEAR = 0.98
ROUNDS, LONGEST_SECONDS = 5, 0.8


def measured(engine: Any, most_tokens: int | None) -> tuple[int, float]:
    """The tokens of a call of `engine` that are enough, and the blocks that it does in a second.

    `most_tokens` is how long a text may be. It takes less than a second, for a slow model that of
    the first calls.
    """
    length = min(TEXT_TOKENS, most_tokens or TEXT_TOKENS)
    text = Ids(range(1, length + 1))
    each = -(-length // BLOCK_TOKENS)
    engine.run([text])  # sizes pools, brings weights into memory
    rates: dict[int, float] = {}
    end = time.perf_counter() + LONGEST_SECONDS
    for blocks in BLOCKS:
        texts, seconds = [text] * (blocks // each), float("inf")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            engine.run(texts)
            seconds = min(seconds, time.perf_counter() - began)
            if time.perf_counter() > end:
                break
        rates[blocks] = blocks / seconds
        if time.perf_counter() > end:
            break
    best = max(rates.values())
    enough = min(blocks for blocks, rate in rates.items() if rate >= NEAR * best)
    return enough * BLOCK_TOKENS, rates[enough]
