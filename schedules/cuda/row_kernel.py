"""Cuts rows of channels for the kernels that hold one in the registers of a few warps
(``rows.cuh``), and writes the bytes beside it.

There are two entries. Where rows are ``few``, all warps of a GPU have room, and more of them to a
row make it faster; where there are many, a warp to a row waits for no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bertile.schedules.cuda.forms import code, constants, element, pitch
from bertile.schedules.cuda.program import program, together
from bertile.schedules.cuda.source import Extent, Kernel
from bertile.schedules.schedule import Knobs, Row, Space
from bertile.schedules.task import Task

HELD = 4  # chunks of 8 channels that a lane holds without effort: of x, gamma and beta
FEW = (0, 512, 1024, 2048)  # rows from which they are many
STATIC = 48 << 10  # bytes of shared memory that a thread block has without asking
KINDS = {"": 0, "int8": 1, "int8_static": 2}


def space(task: Task, row: Row) -> Space:
    """Warps that share a row, and rows of a thread block, for many rows and for fewer than
    ``few``.
    """
    channels = int(task.shape["channels"])
    vectors = 2 if "epsilon" in task.shape else 0  # gamma and beta, and what padding they may have
    if 4 * (pitch(channels) + 32) * vectors > STATIC - 1024:
        return {"warps": ()}
    warps = tuple(w for w in (1, 2, 3, 4, 6, 8) if _chunks(channels, w) <= HELD) or (8,)
    rows = (1, 2, 4)
    return {"warps": warps, "rows": rows, "few_warps": warps, "few_rows": rows, "few": FEW}


def default(task: Task, row: Row) -> Knobs:
    """As few warps as hold a row; for few rows as many as it has chunks for, as long as eight rows
    for each multiprocessor are not reached.
    """
    warps, channels = space(task, row)["warps"], int(task.shape["channels"])
    enough = [w for w in warps if _chunks(channels, w) == 1]
    few = max(end for end in FEW if end <= 8 * row.gpu.multiprocessors)
    wide = min(enough, default=max(warps))
    return {"warps": min(warps), "rows": 2, "few_warps": wide, "few_rows": 1, "few": few}


def _chunks(channels: int, warps: int) -> int:
    return -(-pitch(channels) // (8 * 32 * warps))


@dataclass(frozen=True)
class Narrow:
    """The operands of a kernel that writes its row as bytes: kind "int8" with a range of its own,
    "int8_static" with one for all rows, "" not at all.
    """

    kind: str
    smooth: bool

    @staticmethod
    def of(task: Task) -> Narrow:
        """What the task's shape asks for."""
        return Narrow(str(task.shape.get("kind", "")), bool(task.shape.get("smooth")))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the weights."""
        limits = self.kind == "int8_static"
        return (*(["smooth"] if self.smooth else []), *(["limits"] if limits else []))

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results."""
        return {"": (), "int8": ("q", "range"), "int8_static": ("q",)}[self.kind]

    @property
    def call(self) -> str:
        """The statement that narrows ``x``."""
        if not self.kind:
            return ""
        has = {*self.inputs, *self.results}
        operands = [name if name in has else "nullptr" for name in ("smooth", "limits", "range")]
        smooth, limits, range_ = operands
        return f"row.narrow(x, {smooth}, {limits}, q, {range_});"


def row_kernel(
    task: Task,
    knobs: Knobs,
    parameters: Sequence[tuple[str, str]],
    extents: Sequence[str],
    helpers: str,
    body: str,
) -> Kernel:
    """A kernel of (type, name) pointers and the symbols ``rows`` and ``extents``; ``body`` has
    ``row`` to ask where it is.
    """

    def entry(name: str, warps: int, rows: int, when: Extent) -> Kernel:
        text = f"using X = {element(task)};\n{_constants(task, warps, rows)}"
        text = f"{text}\n{code('rows.cuh')}\n{helpers}"
        inside = f"""
  __shared__ float partial[4 * ROWS * WARPS];
  const Row row(rows, partial);
  float x[CHUNKS][8];
{body}"""
        grid = (f"(rows + {rows - 1}) // {rows}", 1, 1)
        symbols = ["rows", *extents]
        return program(name, 32 * warps * rows, grid, parameters, symbols, text, inside, when=when)

    few, name = knobs["few"], task.name
    many = entry(name, knobs["warps"], knobs["rows"], f"rows >= {few}" if few else 1)
    if not few:
        return many
    wide = entry(f"{name}_few", knobs["few_warps"], knobs["few_rows"], f"rows < {few}")
    return together(wide, many)


def _constants(task: Task, warps: int, rows: int) -> str:
    channels, narrow = int(task.shape["channels"]), Narrow.of(task)
    return constants(
        C=channels,
        PITCH=pitch(channels),
        WARPS=warps,
        ROWS=rows,
        KIND=KINDS[narrow.kind],
        SMOOTH=narrow.smooth,
        EPSILON=float(task.shape.get("epsilon", 0.0)),
        RMS=bool(task.shape.get("rms")),
    )


def padded(weights: Sequence[np.ndarray], channels: int) -> list[np.ndarray]:
    """Vectors of ``channels`` padded with zeros to the pitch, others as they come."""
    padding = pitch(channels) - channels
    return [np.pad(w, (0, padding)) if w.shape == (channels,) else w for w in weights]
