"""What the kernels share that hold one row of channels in the registers of a few warps
(``rows.cuh``): how a row is cut, and the bytes that they may write beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bertile.schedules.cuda.forms import code, constants, element, pitch
from bertile.schedules.cuda.program import program
from bertile.schedules.cuda.source import Kernel
from bertile.schedules.schedule import Knobs, Row, Space
from bertile.schedules.task import Task

HELD = 4  # chunks of 8 channels that a lane holds without effort: of x, gamma and beta
KINDS = {"": 0, "int8": 1, "int8_static": 2}


def space(task: Task, row: Row) -> Space:
    """Warps that share a row, and rows of a thread block."""
    channels = int(task.shape["channels"])
    warps = tuple(w for w in (1, 2, 4, 8) if _chunks(channels, w) <= HELD)
    return {"warps": warps or (8,), "rows": (1, 2, 4)}


def default(task: Task, row: Row) -> Knobs:
    """As few warps as hold a row: the fewer, the less waits for a barrier."""
    return {"warps": min(space(task, row)["warps"]), "rows": 2}


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
    channels, threads = int(task.shape["channels"]), 32 * knobs["warps"] * knobs["rows"]
    narrow = Narrow.of(task)
    values = constants(
        C=channels,
        PITCH=pitch(channels),
        WARPS=knobs["warps"],
        ROWS=knobs["rows"],
        KIND=KINDS[narrow.kind],
        SMOOTH=narrow.smooth,
        EPSILON=float(task.shape.get("epsilon", 0.0)),
    )
    helpers = f"using X = {element(task)};\n{values}\n{code('rows.cuh')}\n{helpers}"
    body = f"""
  __shared__ float partial[4 * ROWS * WARPS];
  const Row row(rows, partial);
  float x[CHUNKS][8];
{body}"""
    grid = (f"(rows + {knobs['rows'] - 1}) // {knobs['rows']}", 1, 1)
    return program(task.name, threads, grid, parameters, ["rows", *extents], helpers, body)


def padded(weights: Sequence[np.ndarray], channels: int) -> list[np.ndarray]:
    """Vectors of ``channels`` padded with zeros to the pitch, others as they come."""
    padding = pitch(channels) - channels
    return [np.pad(w, (0, padding)) if w.shape == (channels,) else w for w in weights]
