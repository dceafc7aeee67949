"""Reads a matrix product's x: from memory, or from a buffer where a job has made a few blocks of
tokens ready once for all its outputs.

    signed   each byte less 128, which some instructions multiply instead (``Arithmetic.signed``)
    widened  each byte as 16 bits: lane k of four is lanes 2 k and 2 k + 1 of two
    matrix   lanes 2 k and 2 k + 1 zipped: a register holds two tokens of two lanes, as an
             instruction wants them that multiplies two tokens by two outputs
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic, wide_inputs


class Inputs:
    """x (m, K / G, 16), of which ``fill`` makes some blocks ready where the arithmetic wants it.

    To be made where a job's buffers are. In a matrix ``load`` counts halves of tokens: lane 2 k is
    tokens 0 to 7 of lanes 2 k and 2 k + 1, lane 2 k + 1 the other tokens. Without ``ready`` signed
    bytes are made at each load.
    """

    def __init__(
        self,
        x: Any,
        math: Arithmetic,
        token_blocks: int,
        matrix: bool = False,
        widened: bool = False,
        ready: bool = True,
    ) -> None:
        self.x, self.math, self.matrix, self.widened = x, math, matrix, widened
        self.depth = int(x.shape[1])
        self.buffer, self.first = None, tirx.const(0, "int32")
        if widened or (ready and (matrix or math.signed)):
            depth = self.depth * math.parts + (self.depth % 2 if matrix else 0)
            self.buffer = T.alloc_buffer((token_blocks, depth, BLOCK_TOKENS), math.lane)

    def fill(self, block: Any, token_blocks: Any) -> None:
        """Make ready what ``load`` gives of ``token_blocks`` blocks from ``block``."""
        if self.buffer is None:
            return
        self.first = block
        with T.serial(token_blocks) as t:
            if self.matrix:
                self._zip(block, t)
                return
            with T.serial(self.depth) as k:
                value = lanes.load(self.x, block + t, k)
                parts = wide_inputs(value) if self.widened else [_signed(value)]
                for i, part in enumerate(parts):
                    lanes.store(self.buffer, part, t, len(parts) * k + i)

    def _zip(self, block: Any, t: Any) -> None:
        def pair(k: Any, low: Any, high: Any) -> None:
            for half, value in enumerate(zipped(low, high, self.math.lane)):
                lanes.store(self.buffer, value, t, 2 * k + half)

        with T.serial(self.depth // 2) as k:
            low, high = (lanes.load(self.x, block + t, 2 * k + i) for i in range(2))
            pair(k, low, high)
        if self.depth % 2:
            last = lanes.load(self.x, block + t, self.depth - 1)
            nothing = tirx.Broadcast(tirx.const(0, self.math.lane), BLOCK_TOKENS)
            pair(self.depth // 2, last, nothing)

    def load(self, block: Any, t: int, k: Any) -> Any:
        """Lane k of the block ``block`` + t, one of those that ``fill`` was told of."""
        if self.buffer is not None:
            return lanes.load(self.buffer, block - self.first + t, k)
        value = lanes.load(self.x, block + t, k)
        return _signed(value) if self.math.signed else value


def _signed(value: Any) -> Any:
    """Unsigned bytes less 128, in the order in which they are multiplied."""
    return tirx.call_extern(f"int32x{BLOCK_TOKENS}", "bertile_signed", value)


def zipped(low: Any, high: Any, dtype: str) -> tuple[Any, Any]:
    """Lane by lane one of ``low``, one of ``high``: the first and the second half."""
    return _both("bertile_zip0", "bertile_zip1", low, high, dtype)


def unzipped(first: Any, second: Any, dtype: str) -> tuple[Any, Any]:
    """The inverse of ``zipped``."""
    return _both("bertile_even", "bertile_odd", first, second, dtype)


def _both(first: str, second: str, a: Any, b: Any, dtype: str) -> tuple[Any, Any]:
    """What two functions on lanes of int32 make of two vectors of any lanes of 32 bits."""
    lane, dtype = f"int32x{BLOCK_TOKENS}", f"{dtype}x{BLOCK_TOKENS}"
    a, b = (T.Bind(tirx.reinterpret(lane, v)) for v in (a, b))
    halves = [tirx.call_extern(lane, name, a, b) for name in (first, second)]
    return T.Bind(tirx.reinterpret(dtype, halves[0])), T.Bind(tirx.reinterpret(dtype, halves[1]))
