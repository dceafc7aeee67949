"""Stores weights of a matrix product in 4 bits, and unpacks a panel of them (see ``panels``).

    w       (panels, vectors × 16) int32: of two registers of bytes the lower and the upper halves
    scales  (panels, vectors × 16) int16: float16, of each group of inputs and output of the panel

A level is -8 to 7. Unpacked it is 16 times that, a byte whose lower half is nothing: one shift and
two masks make two registers. The 16 goes into the scales, which become float32 at the same time.
From the first-level cache on the kernel is that of bytes; from memory comes half. Where products
are summed in 16 bits it is the level itself, which takes three steps more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import lanes
from bertile.schedules.cpu.arithmetic import Arithmetic, from_halves
from bertile.schedules.cpu.panels import Panels, ramp, vectors

TIMES = 16  # what a byte is of its level
UPPER, LOWER = 0xF0F0F0F0, 0x0F0F0F0F  # of each byte


class Nibbles(Panels):
    """The weights of a kernel in 4 bits. ``steps`` lanes of four inputs share a scale."""

    lanes = 2

    def __init__(self, w: Any, scales: Any, math: Arithmetic, width: int, steps: int) -> None:
        super().__init__(w, math, width)
        self.scales, self.steps = scales, steps
        self.floats: Any = None

    @staticmethod
    def of_groups(
        builder: lanes.KernelBuilder,
        math: Arithmetic,
        panels: int,
        depth: int,
        width: int,
        size: int,
    ) -> Nibbles:
        """The arguments w and scales, of ``depth`` lanes of four inputs in groups of ``size``."""
        groups = -(-4 * depth // size)
        w = builder.tensor("w", panels, vectors(depth * width, 2) * 16, dtype="int32")
        scales = builder.tensor("scales", panels, vectors(groups * width) * 16, dtype="int16")
        return Nibbles(w, scales, math, width, size // 4)

    def allocate(self) -> None:
        super().allocate()
        self.floats = T.alloc_buffer((int(self.scales.shape[1]),), "float32")

    def unpack(self, panel: Any) -> None:
        """Make ``lane`` and ``scale`` those of a panel."""
        with T.serial(int(self.w.shape[1]) // BLOCK_TOKENS) as i:
            both = T.Bind(self.w[panel, ramp(i)])
            for part, value in enumerate(self._levels(both)):
                self._put(2 * i + part, T.Bind(value))
        with T.serial(int(self.scales.shape[1]) // BLOCK_TOKENS) as i:
            scale = from_halves(self.scales[panel, ramp(i)])
            T.buffer_store(self.floats, scale * lanes.splat(1.0 / self._times), [ramp(i)])

    @property
    def _times(self) -> int:
        return 1 if self.math.run > 1 else TIMES

    def _levels(self, both: Any) -> list[Any]:
        """Two registers of bytes, of one with both halves of each."""
        four = _all(4)
        if self._times == TIMES:
            return [(both << four) & _all(UPPER), both & _all(UPPER)]
        lower = _all(LOWER)
        return [_signed(both & lower), _signed((both >> four) & lower)]

    def scale(self, group: Any, n: int) -> Any:
        """What the sum of a group of inputs is multiplied by."""
        return self.floats[group * self.width + n]


def _all(word: int) -> Any:
    """A number of 32 bits in every lane."""
    return tirx.Broadcast(tirx.const(word - ((word >> 31) << 32), "int32"), BLOCK_TOKENS)


def _signed(halves: Any) -> Any:
    """Four bits in each byte, of two's complement, as a byte: less 8 and plus 8 again, of which
    nothing is carried from byte to byte.
    """
    return ((halves ^ _all(0x08080808)) + _all(0x78787878)) ^ _all(0x80808080)


def pack_nibbles(
    levels: np.ndarray, scales: np.ndarray, panels: int, width: int, size: int
) -> list[np.ndarray]:
    """w and scales of levels (K, N) int8, and scales (K / size, N) float16; the last group may be
    short.
    """
    inputs, outputs = levels.shape
    depth = -(-inputs // 4)
    padding = panels * width - outputs
    levels = np.pad(levels, ((0, 4 * depth - inputs), (0, padding)))
    lanes_ = levels.reshape(depth, 4, panels, width).transpose(2, 0, 3, 1).reshape(panels, -1)
    registers = vectors(depth * width, 2)
    lanes_ = np.pad(lanes_, ((0, 0), (0, registers * 128 - lanes_.shape[1]))).view("uint8")
    lower, upper = lanes_.reshape(panels, registers, 2, 64).transpose(2, 0, 1, 3)
    w = np.ascontiguousarray((lower & 15) | (upper << 4)).reshape(panels, -1).view("int32")
    groups = len(scales)
    parts = np.pad(scales.astype("float16"), ((0, 0), (0, padding)))
    parts = parts.reshape(groups, panels, width).transpose(1, 0, 2).reshape(panels, -1)
    short = vectors(groups * width) * BLOCK_TOKENS - groups * width
    return [w, np.ascontiguousarray(np.pad(parts, ((0, 0), (0, short)))).view("int16")]
