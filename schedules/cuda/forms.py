"""Lays activations out row-major on the GPU: (rows, pitch(C)), the padding columns are zero.

Rows are tokens in blocks of 16 (``rows`` = 16 × ``blocks``), or one for each sequence. Layers in
bytes write and read float16 beside them.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda import precisions
from bertile.schedules.task import Task

LOWEST = -1e30  # below any score, and small enough that differences of two stay finite
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "float": 2.0**-24}  # of a stored value, relative


def pitch(channels: int) -> int:
    """Elements from one row to the next: rows start on a multiple of 16."""
    return -(-channels // 16) * 16


def element(task: Task) -> str:
    """The CUDA type of a task's activations."""
    return precisions.of(task).element


def to_device(values: np.ndarray, kind: str) -> np.ndarray:
    """Values as ``kind`` ("f16", "bf16", "float") stores them: bfloat16 is uint16."""
    if kind == "f16":
        return values.astype("float16")
    values = np.ascontiguousarray(values, "float32")
    if kind == "float":
        return values
    bits = values.view("uint32")
    return ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype("uint16")


def from_device(stored: np.ndarray) -> np.ndarray:
    """The float32 values of what ``to_device`` gives."""
    if stored.dtype == np.uint16:
        return (stored.astype("uint32") << np.uint32(16)).view("float32")
    return stored.astype("float32")


def to_rows(values: np.ndarray, kind: str) -> np.ndarray:
    """(rows, C) float32 → (rows, pitch(C)) as stored."""
    channels = values.shape[1]
    return to_device(np.pad(values, ((0, 0), (0, pitch(channels) - channels))), kind)


def from_rows(stored: np.ndarray, channels: int) -> np.ndarray:
    """The inverse of :func:`to_rows`; NaN where a padding column is not zero."""
    values = from_device(stored)
    return np.where(values[:, channels:].any(1, keepdims=True), np.nan, values[:, :channels])


def empty_rows(rows: int, channels: int, kind: str) -> np.ndarray:
    """Zeros in the form of an activation, bytes ("u8") too."""
    if kind == "u8":
        return np.zeros((rows, pitch(channels)), "uint8")
    return to_rows(np.zeros((rows, channels), "float32"), kind)


def token_table(lengths: list[int]) -> np.ndarray:
    """(blocks, 4) int32 for sequences of these lengths: row of the batch, first token, first block
    of the sequence, its blocks.
    """
    lines, first = [], 0
    for row, length in enumerate(lengths):
        count = -(-length // BLOCK_TOKENS)
        lines += [[row, i * BLOCK_TOKENS, first, count] for i in range(count)]
        first += count
    return np.array(lines, "int32")


def symbols(rows: int, batch: int = 1, length: int = 1, **extents: int) -> dict[str, int]:
    """What a launch on a sample may ask for."""
    return {
        "rows": rows,
        "batch": batch,
        "length": length,
        "blocks": rows // BLOCK_TOKENS,
        **extents,
    }


def code(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def constants(**values: float) -> str:
    """The lines that define a kernel's constants."""
    lines = []
    for name, value in values.items():
        if isinstance(value, float):
            lines.append(f"constexpr float {name} = {value!r}f;")
        else:
            lines.append(f"constexpr int {name} = {int(value)};")
    return "\n".join(lines)
