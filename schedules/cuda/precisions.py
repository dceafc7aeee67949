"""Holds a row for each precision that a matrix product of a GPU multiplies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bertile.schedules.task import Task


class Precision(NamedTuple):
    """``element`` is the CUDA type of activations, ``read`` that of the product's own operands.

    ``multiply`` is the word of a warp's product, "" where lanes multiply without tensor cores;
    ``rate`` its multiply-adds relative to those of 16 bits, ``grouped`` whether wgmma has it.
    ``as_multiplied`` is what becomes of 32 bits of an operand before. ``vectors`` are the numbers
    that each output channel has: b, and scale and shift of bytes; with ``ranges`` each row of x has
    its own. ``others`` are registers beside sums and fragments.
    """

    element: str
    read: str
    multiply: str = ""
    rate: float = 1.0
    grouped: bool = False
    as_multiplied: str = "x"
    vectors: int = 1
    ranges: bool = False
    others: int = 46

    @property
    def rounds(self) -> bool:
        """Whether operands in memory have more digits than what is multiplied."""
        return self.as_multiplied != "x"

    @property
    def in_bytes(self) -> bool:
        """Whether operands are bytes, and their sums integers."""
        return self.read == "u8"

    @property
    def fragments(self) -> tuple[int, int]:
        """Registers of a piece of x and of W."""
        return (4, 2) if self.multiply else (8, 8)


def of(task: Task) -> Precision:
    """The row of a task."""
    return PRECISIONS[str(task.shape["precision"])]


_BYTES = Precision("f16", "u8", "mma_16832_u8s8", 2.0, grouped=True)
PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision("float", "float"),
    "tf32": Precision(
        "float",
        "float",
        "mma_1688_tf32",
        0.5,
        as_multiplied="to_tf32(__uint_as_float(x))",
        others=62,
    ),
    "fp16": Precision("f16", "f16", "mma_16816<f16>", grouped=True),
    "bf16": Precision("bf16", "bf16", "mma_16816<bf16>", grouped=True),
    "int8": _BYTES._replace(vectors=3, ranges=True),
    "int8_static": _BYTES._replace(vectors=2),
}
