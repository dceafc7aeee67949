"""Packs sparse weights as the kernel in ``sparse`` reads them: lists of the lanes that are not
zero.

Units, outputs that are finished together as the lanes of y are, are dealt to ``groups`` of about
equal work, ``places`` outputs each, padded. For
each group and part of K, the outputs are ordered by the lengths of their lists and taken as many
at a time as a tile has: a panel, whose lists lie interleaved and are padded to the longest.

    values (nonzeros)                 lane of each entry: panel by panel, position, output
    index  (nonzeros)                 which lane of its part of x it meets
    starts (groups parts panels + 1)  where each panel's positions start, in positions
    slots  (groups, parts, places)    which of its group's outputs each list of the panels is
    units  (groups, places / unit)    which unit each of a group's is; outside y: padding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bertile.schedules.cpu.arithmetic import halves
from bertile.schedules.cpu.product import (
    byte_offset,
    group,
    multiplies,
    unit,
    weight_lanes,
    writes,
)
from bertile.schedules.outputs_that_meet import ordered
from bertile.schedules.schedule import Knobs, Row
from bertile.schedules.task import Task

PARTS = ("values", "index", "starts", "slots", "units")


@dataclass(frozen=True)
class Layout:
    """The sizes that follow from a task and its knobs."""

    depth: int  # lanes of x
    parts: int  # of K
    part: int  # lanes of x in one part; fewer in the last
    groups: int
    panels: int  # of a group
    outputs: int  # of a panel
    unit: int  # outputs that are finished together
    units: int

    @staticmethod
    def of(task: Task, knobs: Knobs) -> Layout:
        """What the knobs make of the task's shape."""
        depth = -(-task.shape["inputs"] // group(task))
        each = unit(task)
        units = -(-task.shape["outputs"] // each)
        groups = min(knobs["groups"], units)
        outputs = max(1, knobs["accumulators"] // knobs["token_blocks"])
        share = -(-units // groups) * each
        whole = max(outputs, each)  # both are powers of two
        panels = -(-share // whole) * whole // outputs
        part = -(-depth // knobs["parts"])
        parts = -(-depth // part)
        return Layout(depth, parts, part, groups, panels, outputs, each, units)

    @property
    def places(self) -> int:
        """Outputs of a group, those that pad it included."""
        return self.panels * self.outputs

    @property
    def index(self) -> str:
        """The dtype that counts the lanes of a part."""
        return unsigned(self.part)

    @property
    def slot(self) -> str:
        """The dtype that counts the outputs of a group."""
        return unsigned(self.places)


def unsigned(count: int) -> str:
    """The smallest dtype that counts to ``count`` - 1."""
    return "uint8" if count <= 256 else "uint16" if count <= 65536 else "int32"


def pack(task: Task, knobs: Knobs, weights: Sequence[np.ndarray], row: Row) -> list[np.ndarray]:
    """w (K, N), then the vectors in the kernel's order → values, index, starts, slots, units and
    the vectors, in the order of the groups.
    """
    limits = [weights[-1]] if writes(task) == "to_int8" else []
    w, *vectors = ordered(task, weights[: len(weights) - len(limits)])
    math = multiplies(task, row)
    offset = [byte_offset(w)] if math.signed else []
    of = Layout.of(task, knobs)
    w = weight_lanes(task, w + np.zeros((), w.dtype))  # the sum of -0.0 and 0.0 is 0.0
    w = np.pad(w, ((0, 0), (0, -w.shape[1] % of.unit)))
    w = halves(w) if math.pairs else w[:, None]  # of a lane each entry that it may have
    units = _dealt(of, (w != 0).sum((0, 1)).reshape(of.units, of.unit).sum(1))
    outputs = (units[..., None] * of.unit + np.arange(of.unit)).ravel()
    real = outputs < w.shape[-1]
    w = np.pad(w, ((0, 0), (0, 0), (0, 1)))[..., np.where(real, outputs, w.shape[-1])]
    real = outputs < task.shape["outputs"]
    vectors, offset = (
        [np.where(real, v[np.where(real, outputs, 0)], v.dtype.type(0)) for v in some]
        for some in (vectors, offset)
    )
    return [*_lists(of, w), units.astype("int32"), *vectors, *limits, *offset]


def _dealt(of: Layout, lengths: np.ndarray) -> np.ndarray:
    """Units (groups, units of a group), ascending: like cards, the longest first, to and fro.

    ``of.units`` and above stand for padding.
    """
    each = of.places // of.unit
    order = np.argsort(-lengths, kind="stable")
    order = np.concatenate([order, np.full(of.groups * each - of.units, of.units)])
    dealt = order.reshape(each, of.groups)
    dealt[1::2] = dealt[1::2, ::-1]
    return np.sort(dealt.T, 1)


def _lists(of: Layout, w: np.ndarray) -> list[np.ndarray]:
    """w (K / G, entries of a lane, groups places) → values, index, starts, slots."""
    entries = w.shape[1]
    w = np.pad(w, ((0, of.parts * of.part - of.depth), (0, 0), (0, 0)))
    w = w.reshape(of.parts, of.part * entries, of.groups, of.places).transpose(2, 0, 3, 1)
    lengths = (w != 0).sum(3)
    slots = np.argsort(-lengths, 2, kind="stable")
    w = np.take_along_axis(w, slots[..., None], 2)
    w = w.reshape(-1, of.outputs, of.part * entries)  # panel, output, entry
    lists = np.take_along_axis(lengths, slots, 2).ravel()
    longest = lists.reshape(-1, of.outputs).max(1)
    starts = np.concatenate([[0], np.cumsum(longest)])
    panel, output, entry = np.nonzero(w)
    first = np.cumsum(lists) - lists  # of each list among all that is not zero
    position = np.arange(len(entry)) - first[panel * of.outputs + output]
    at = (starts[panel] + position) * of.outputs + output
    count = max(1, int(starts[-1])) * of.outputs  # no tensor is empty
    values, index = np.zeros(count, w.dtype), np.zeros(count, of.index)
    values[at], index[at] = w[panel, output, entry], entry // entries
    return [values, index, starts.astype("int32"), slots.astype(of.slot)]
