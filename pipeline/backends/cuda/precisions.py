"""Refuses precisions that a GPU has no tensor cores for."""

from __future__ import annotations

from bertile.base.errors import PlatformError
from bertile.numerics.precision import PRECISIONS
from bertile.targets.rows import Target


def check(precision: str, row: Target) -> None:
    """PlatformError where the GPU cannot compute in that precision."""
    if PRECISIONS[precision].groups:
        raise PlatformError(
            f"target {row.name} has no {precision}: kernels of 4-bit weights are for processors",
            "compile with --precision int8",
        )
    if precision == "tf32" and not row.gpu.async_copy:
        raise PlatformError(
            f"target {row.name} has no tf32: tensor cores of NVIDIA GPUs from cuda-sm80 on have it",
            "compile with --precision fp32",
        )
    if precision == "bf16" and not row.bf16:
        raise PlatformError(
            f"target {row.name} has no bfloat16: tensor cores have it from cuda-sm80 on",
            "compile with --precision fp16",
        )
