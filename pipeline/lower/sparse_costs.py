"""Estimates the time of a sparse kernel, as a share of the dense kernel's."""

from __future__ import annotations

from bertile.schedules.cpu import tiles
from bertile.schedules.cpu.product import group, multiplies
from bertile.schedules.schedule import Row
from bertile.schedules.task import Task

# Of a multiply-add in the sparse kernel, against one in the dense kernel: each loads its own vector
# of the input and an index, where a tile of the dense kernel loads them once for several outputs.
STEP = {"fp32": 2.15, "fp16": 1.38, "bf16": 1.84, "int8": 1.56}
# Of an output's list, in multiply-adds of the dense kernel: its start, its end, and the epilogue of
# a tile that is one output wide.
LIST = 17.0
# Where the dense kernel multiplies tiles, which zeros cannot be skipped in: by how much these are
# faster than the vectors that both kernels multiply elsewhere (a Xeon with AMX, 80 to 95% zeros).
TILES = {"bf16": 9.3, "int8": 2.6}


def relative_time(task: Task, row: Row | None = None) -> float:
    """Time of a "sparse" task divided by that of the dense kernel of the same layer.

    Both kernels do their multiply-adds at a constant rate, the sparse one on `density` percent of
    them, and the sparse one pays for each output beside:

        density / 100 × STEP + LIST / (lanes of inputs)

    Twice that on a machine whose dense kernel multiplies two tokens by two outputs at once, and
    TILES times that where it multiplies tiles.
    """
    depth = -(-task.shape["inputs"] // group(task))
    precision = str(task.shape.get("precision", "fp32")).removesuffix("_static")
    share = task.shape["density"] / 100 * STEP[precision] + LIST / depth
    if row is None:
        return share
    if tiles.takes(task, row):
        return TILES[precision] * share
    return 2 * share if multiplies(task, row).matrix else share
