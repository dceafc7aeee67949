"""Tells where the zeros of a linear layer's weight lie, and how much a kernel can skip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Blocks of (inputs, outputs) by name, the largest first.
BLOCKS = {"32x1": (32, 1), "16x1": (16, 1), "1x16": (1, 16), "4x1": (4, 1)}
PATTERNS = ("dense", "unstructured", *BLOCKS, "2:4")

DENSE = 0.2  # a smaller share of zeros is nothing that a sparse kernel could gain from
STRAY = 0.1  # zeros that were never pruned: what rounding to 8 bits makes of small weights


@dataclass(frozen=True)
class Sparsity:
    """`zeros` is the share of elements that are zero, `pattern` one of PATTERNS; `zero_inputs` and
    `zero_outputs` count the whole rows and columns of w (K, N) that are zero.
    """

    zeros: float
    pattern: str
    zero_inputs: int
    zero_outputs: int


def analyse(w: np.ndarray) -> Sparsity:
    """Where the zeros of w (K inputs, N outputs), of any dtype, lie.

    "dense": less than 20% of the elements are zero. A block pattern AxB (A inputs, B outputs) holds
    where nearly all zeros lie in blocks that are zero as a whole: where A divides K, B divides N,
    and of the elements in all other blocks at most 10% are zero. The largest block that holds
    names the pattern. "2:4": at least 2 of every 4 inputs of an output are zero, and where not all
    4 are, at most 10% more than that half. "unstructured": none of these.

    What is left in the other blocks decides, not what share of the zeros lies in whole blocks: at
    99% most of those do by chance, whatever the pattern was.
    """
    kept = w != 0
    zeros = 1 - float(np.count_nonzero(kept)) / kept.size
    return Sparsity(
        zeros=zeros,
        pattern=_pattern(kept) if zeros >= DENSE else "dense",
        zero_inputs=int(np.count_nonzero(~kept.any(1))),
        zero_outputs=int(np.count_nonzero(~kept.any(0))),
    )


def density(w: np.ndarray, group: int) -> float:
    """The share of lanes (`group` inputs of one output of w (K, N)) that are not all zero.

    Where `group` does not divide K, the last lane is the rest.
    """
    kept = w != 0
    kept = np.pad(kept, ((0, -len(kept) % group), (0, 0)))
    lanes = kept.reshape(-1, group, kept.shape[1]).any(1)
    return float(np.count_nonzero(lanes)) / lanes.size


def _pattern(kept: np.ndarray) -> str:
    for name, block in BLOCKS.items():
        share = _zeros_beside_blocks(kept, *block)
        if share is not None and share <= STRAY:
            return name
    return "2:4" if _is_two_of_four(kept) else "unstructured"


def _zeros_beside_blocks(kept: np.ndarray, inputs: int, outputs: int) -> float | None:
    """The share of zeros in the blocks that are not wholly zero; None where blocks do not fit."""
    if kept.shape[0] % inputs or kept.shape[1] % outputs:
        return None
    blocks = kept.reshape(kept.shape[0] // inputs, inputs, -1, outputs).any((1, 3))
    elements = np.count_nonzero(blocks) * inputs * outputs
    return 1 - np.count_nonzero(kept) / elements if elements else 0.0


def _is_two_of_four(kept: np.ndarray) -> bool:
    share = _zeros_beside_blocks(kept, 4, 1)
    if share is None or share > 0.5 * (1 + 2 * STRAY):
        return False
    return bool((kept.reshape(-1, 4, kept.shape[1]).sum(1, dtype=np.uint8) <= 2).all())
