"""Says what a dense task is on a GPU in bytes, and which tile of its result a block makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bertile.schedules.cuda import precisions
from bertile.schedules.cuda.forms import element, pitch
from bertile.schedules.cuda.precisions import Precision
from bertile.schedules.outputs_that_meet import is_gated, turned
from bertile.schedules.schedule import Gpu
from bertile.schedules.task import Task

PANEL = 128  # bytes of K
SIZE = {"f16": 2, "bf16": 2, "float": 4, "u8": 1}
REGISTERS = 255  # of a thread
RESIDUAL = 16  # registers that asking for it beside products takes
GRANULE = 8  # registers are given to a thread by so many
GROUP_COLUMNS = (64, 96, 128, 192, 256)
SMALL = 20480  # bytes of a result that may have a place of its own in shared memory
PRIVATE = 1024  # bytes of shared memory that the system takes of each block


def rounded_tf32(values: np.ndarray) -> np.ndarray:
    """float32 as ``to_tf32`` makes it: to the nearest of 10 bits, ties away from zero."""
    bits = np.ascontiguousarray(values, "float32").view("uint32")
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view("float32")


@dataclass(frozen=True)
class Operands:
    """The element types and sizes of a task. ``vectors``: b, and scale and shift of bytes. Where it
    is ``gated``, two outputs make a channel of y; ``turned`` of the outputs have rotary positions,
    in heads of ``head_size``.
    """

    inputs: int
    outputs: int
    precision: Precision
    wide: str  # type of the residual, and of y where it is not bytes
    result: str  # type of y
    residual: bool
    activation: str
    gated: bool = False
    turned: int = 0
    head_size: int = 0

    @staticmethod
    def of(task: Task) -> Operands:
        """What the task's shape says."""
        shape = task.shape
        precision, wide = precisions.of(task), element(task)
        heads, size = turned(task)
        return Operands(
            int(shape["inputs"]),
            int(shape["outputs"]),
            precision,
            wide,
            "u8" if shape.get("writes") == "to_int8" else wide,
            bool(shape["residual"]),
            str(shape["activation"]),
            is_gated(task),
            heads * size,
            size,
        )

    @property
    def meeting(self) -> int:
        """How many outputs make a channel of y."""
        return 2 if self.gated else 1

    @property
    def channels(self) -> int:
        """Channels of y."""
        return self.outputs // self.meeting

    @property
    def columns(self) -> int:
        """Columns of W, as it is packed: those that make all of a row of y, its padding too."""
        return pitch(self.channels) * self.meeting

    @property
    def read(self) -> str:
        """The type of x."""
        return self.precision.read

    @property
    def size(self) -> int:
        """Bytes of an element of x and W."""
        return SIZE[self.read]

    @property
    def input_bytes(self) -> int:
        """From one row of x to the next."""
        return pitch(self.inputs) * SIZE[self.read]

    @property
    def panels(self) -> int:
        """Of K, the last may be in part."""
        return -(-self.inputs * SIZE[self.read] // PANEL)

    @property
    def vectors(self) -> int:
        """Numbers that each channel has."""
        return self.precision.vectors

    @property
    def ranges(self) -> bool:
        """Whether each row of x has a range."""
        return self.precision.ranges


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result; a warp's share in pieces of 16 rows (``tall``) by 8 columns
    (``wide``); groups of warps that take parts of K (``slices``); slots of shared memory that are
    filled ahead (``stages``); rows of tiles that are made together (``band``). ``grouped``: by
    wgmma, four warps have all columns of 64 rows. ``late``: residual and result take the place of
    the slots.
    """

    operands: Operands
    rows: int
    columns: int
    tall: int
    wide: int
    slices: int
    stages: int
    band: int
    grouped: bool = False
    late: bool = True

    @staticmethod
    def of(task: Task, knobs: Mapping[str, int], gpu: Gpu) -> Tile:
        """The nearest tile to what the knobs ask for that this GPU can run."""
        operands = Operands.of(task)
        names = ("rows", "columns", "tall", "wide", "slices", "stages", "band")
        tile = Tile(operands, *(knobs[name] for name in names), bool(knobs.get("tensor")))
        return tile._shaped()._fitted(gpu)._placed(gpu)

    def _placed(self, gpu: Gpu) -> Tile:
        """With a place of its own for the residual, which is there in time then, and for a small
        result, if that leaves room for as many blocks.
        """
        apart = replace(self, late=False)
        useful = self.operands.residual or self._tile <= SMALL
        if self.operands.residual and self.registers + RESIDUAL > REGISTERS:
            return self
        fits = apart.shared <= gpu.shared_per_block
        return apart if useful and fits and apart.resident(gpu) == self.resident(gpu) else self

    def _shaped(self) -> Tile:
        """Warps that divide the tile, slices that divide K and the pieces."""
        if self.grouped:
            most = min(self.columns, self.operands.columns)
            columns = next(n for n in GROUP_COLUMNS if n >= most)
            rows = max(64, min(self.rows, 256 if columns <= 192 else 128))
            fitted = replace(self, rows=rows, columns=columns, tall=1, slices=1)
            return replace(fitted, wide=columns // 8, stages=max(3, self.stages))
        columns = min(self.columns, self.operands.columns)
        tall = min(self.tall, self.rows // 16)
        wide = next(w for w in range(self.wide, 0, -1) if w % 2 == 0 and columns // 8 % w == 0)
        most = min(self.slices, self.operands.panels)
        slices = next(s for s in range(most, 0, -1) if tall * wide % s == 0)
        fitted = replace(self, columns=columns, tall=tall, wide=wide, slices=slices)
        return replace(fitted, stages=max(2, min(self.stages, fitted.iterations + 1)))

    def _fitted(self, gpu: Gpu) -> Tile:
        """Fewer stages, then fewer slices, then a smaller tile, until a block fits the GPU."""
        if self.registers > REGISTERS:
            return replace(self, wide=self.wide // 2)._shaped()._fitted(gpu)
        fits = self.threads <= 1024 and self.registers * self.threads <= gpu.registers_per_sm
        if fits and self.shared <= gpu.shared_per_block:
            return self
        if fits and self.stages > (3 if self.grouped else 2):
            return replace(self, stages=self.stages - 1)._fitted(gpu)
        if self.slices > 1:
            return replace(self, slices=self.slices // 2)._shaped()._fitted(gpu)
        if self.rows > self.columns:
            return replace(self, rows=self.rows // 2)._shaped()._fitted(gpu)
        columns = self.columns // 32 * 16
        if self.grouped:
            columns = max(n for n in GROUP_COLUMNS if n < self.columns)
        return replace(self, columns=columns)._shaped()._fitted(gpu)

    def plain(self) -> Tile:
        """The same tile by as many threads without wgmma, for code of other GPUs."""
        return replace(self, grouped=False, tall=2, wide=self.columns // 16)

    @property
    def warps(self) -> int:
        """Of a slice."""
        if self.grouped:
            return self.rows // 16
        return self.rows // (16 * self.tall) * (self.columns // (8 * self.wide))

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps * self.slices

    @property
    def iterations(self) -> int:
        """Steps of K, a panel for every slice."""
        return -(-self.operands.panels // self.slices)

    @property
    def registers(self) -> int:
        """About what a thread needs: sums, two sets of fragments, addresses."""
        if self.grouped:
            return 4 * self.wide + 32
        precision = self.operands.precision
        a, b = precision.fragments
        fragments = 2 * (a * self.tall + b * self.wide)
        sums = 4 * self.tall * self.wide
        return -(-(sums + fragments + precision.others) // GRANULE) * GRANULE

    @property
    def slot(self) -> int:
        """Bytes of a stage."""
        return (self.rows + self.columns) * PANEL * self.slices

    @property
    def _front(self) -> int:
        """Bytes of the slots, or of the sums that are exchanged there."""
        sums = self.rows * self.columns * 4 * self.slices if self.slices > 1 else 0
        return max(self.stages * self.slot, sums, self._tile if self.late else 0)

    @property
    def _vectors(self) -> int:
        ranges = 8 * self.rows if self.operands.ranges else 0
        return 4 * self.operands.vectors * self.columns + ranges

    def pitch(self, kind: str) -> int:
        """Bytes from a row of a tile in shared memory to the next: what lanes write of two columns
        at once, four of each of eight rows, lies in different banks.
        """
        meeting = self.operands.meeting
        lane = 2 // meeting * SIZE[kind]
        rows = 8 * 4 // lane if lane > 4 else 8  # eight bytes go by half warps

        def apart(pitch: int) -> bool:
            banks = {(row * pitch + i * 4) // 4 % 32 for row in range(rows) for i in range(lane)}
            return len(banks) == rows * lane

        first = self.columns // meeting * SIZE[kind] + 16
        return next(pitch for pitch in range(first, first + 128, 16) if apart(pitch))

    @property
    def _apart(self) -> bool:
        return self.operands.residual and self.operands.result != self.operands.wide

    @property
    def _tile(self) -> int:
        """Bytes of the residual and the result, in one place where they are of one type."""
        kinds = {self.operands.result, *([self.operands.wide] if self.operands.residual else [])}
        return sum(self.rows * self.pitch(kind) for kind in kinds)

    @property
    def at(self) -> dict[str, int]:
        """Where things lie in shared memory."""
        vectors = self._front
        residual = 0 if self.late else vectors + self._vectors
        apart = self.rows * self.pitch(self.operands.wide) if self._apart else 0
        return {"VECTORS": vectors, "RESIDUAL": residual, "RESULT": residual + apart}

    @property
    def shared(self) -> int:
        """Bytes of a block."""
        return self._front + self._vectors + (0 if self.late else self._tile)

    def resident(self, gpu: Gpu) -> int:
        """Blocks that a multiprocessor has at once."""
        by_registers = gpu.registers_per_sm // (self.registers * self.threads)
        by_shared = gpu.shared_per_sm // (self.shared + PRIVATE)
        return max(1, min(by_registers, by_shared, gpu.threads_per_sm // self.threads))

    def constants(self, name: str) -> str:
        """The struct that the templates of ``dense.cuh`` take."""
        values = {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "TALL": self.tall,
            "WIDE": self.wide,
            "WARPS": self.warps,
            "WARPS_ACROSS": self.columns // (8 * self.wide),
            "SLICES": self.slices,
            "THREADS": self.threads,
            "STAGES": self.stages,
            "ITERATIONS": self.iterations,
            "PORTION": self.tall * self.wide // self.slices,
            "SLOT": self.slot,
            "BAND": self.band,
            "LATE": int(self.late),
            "RESIDUAL_PITCH": self.pitch(self.operands.wide),
            "RESULT_PITCH": self.pitch(self.operands.result),
            **{f"AT_{key}": value for key, value in self.at.items()},
        }
        lines = [f"  static constexpr int {key} = {value};" for key, value in values.items()]
        return "\n".join([f"struct {name} {{", *lines, "};"])
