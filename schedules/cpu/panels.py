"""Unpacks weights of a matrix product panel by panel, once in a job for all its blocks of tokens:
to the numbers of 32 bits that are multiplied, in the first-level cache.

    w   (panels, vectors × 16) int32 or int16: of a panel lane by lane, in each its outputs

Bytes become 16-bit integers where a machine multiplies those, float16 becomes float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic, from_halves, wide_weights


class Panels:
    """The weights of a kernel, and the panel of ``width`` outputs that was unpacked last. Those of
    ``lanes`` lanes are one number in memory.
    """

    lanes = 1

    def __init__(self, w: Any, math: Arithmetic, width: int) -> None:
        self.w, self.math, self.width = w, math, width
        self.unpacked: Any = None

    @staticmethod
    def declare(
        builder: lanes.KernelBuilder, math: Arithmetic, panels: int, depth: int, width: int
    ) -> Panels:
        """The argument w, of ``depth`` lanes."""
        numbers = vectors(depth * width) * BLOCK_TOKENS
        return Panels(builder.tensor("w", panels, numbers, dtype=math.weight), math, width)

    def allocate(self) -> None:
        """Where a panel is unpacked to; to be called where a job's buffers are."""
        numbers = int(self.w.shape[1]) * self.lanes * self.math.parts
        self.unpacked = T.alloc_buffer((numbers,), self.math.lane)

    def unpack(self, panel: Any) -> None:
        """Make ``lane`` that of a panel."""
        with T.serial(int(self.w.shape[1]) // BLOCK_TOKENS) as i:
            self._put(i, T.Bind(self.w[panel, ramp(i)]))

    def _put(self, vector: Any, value: Any) -> None:
        """16 lanes, as the vector of that number."""
        if self.math.weight == "int16":
            value = from_halves(value)
        parts = wide_weights(value) if self.math.pairs else [value]
        for i, part in enumerate(parts):
            T.buffer_store(self.unpacked, part, [ramp(len(parts) * vector + i)])

    def lane(self, k: Any, n: int, part: int) -> Any:
        """A part of lane k of output n of the panel, as one number."""
        return self.unpacked[(k * self.width + n) * self.math.parts + part]

    def prefetch(self, panel: Any, first: Any, count: int) -> None:
        """Ask for ``count`` lanes of a panel."""
        numbers = count * self.width // self.lanes
        line = lanes.CACHE_LINE // np.dtype(self.math.weight).itemsize
        for place in range(0, numbers, line):
            lanes.prefetch(self.w, panel, first * self.width // self.lanes + place)


def ramp(vector: Any) -> Any:
    """The 16 places of a vector."""
    return tirx.Ramp(vector * BLOCK_TOKENS, 1, BLOCK_TOKENS)


def vectors(numbers: int, of: int = 1) -> int:
    """Registers, or ``of`` times as many, that hold so many numbers of 32 bits."""
    return -(-numbers // (BLOCK_TOKENS * of))


def pack_panels(w: np.ndarray, panels: int) -> np.ndarray:
    """Lanes (K / G, N) of so many panels → w."""
    depth = len(w)
    flat = w.reshape(depth, panels, -1).transpose(1, 0, 2).reshape(panels, -1)
    short = vectors(flat.shape[1]) * BLOCK_TOKENS - flat.shape[1]
    return np.ascontiguousarray(np.pad(flat, ((0, 0), (0, short))))
