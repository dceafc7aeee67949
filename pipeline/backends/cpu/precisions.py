"""Says what each precision means on a processor, and refuses what one has no instructions for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bertile.base.errors import PlatformError
from bertile.targets.rows import Target


class OnCpu(NamedTuple):
    """A row: what a precision asked for makes of the operators that are no linear layers.

    `attention` is what it multiplies in where the processor and the layer before it can, `tables`
    how those of an embedding are stored.
    """

    attention: str
    tables: str


# Attention multiplies in bfloat16 wherever it may: that is faster than bytes there, which would
# need a range per row of scores.
PRECISIONS: Mapping[str, OnCpu] = {
    "fp32": OnCpu("fp32", "fp32"),
    "fp16": OnCpu("fp32", "fp16"),
    "bf16": OnCpu("bf16", "fp16"),
    "int8": OnCpu("bf16", "fp16"),
    "int4": OnCpu("bf16", "fp16"),
}


def check(precision: str, row: Target) -> None:
    """PlatformError where the target cannot compute in that precision."""
    if precision not in PRECISIONS:
        raise PlatformError(
            f"target {row.name} has no {precision}: tensor cores of NVIDIA GPUs from cuda-sm80 on"
            " have it",
            "compile with --precision fp32",
        )
    if precision == "bf16" and not row.bf16:
        raise PlatformError(
            f"target {row.name} has no bfloat16 instructions (its features end in"
            f" {' '.join(row.features[-2:])})",
            "compile with --precision fp32 or int8, or for a target that has avx512_bf16",
        )
