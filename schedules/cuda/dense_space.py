"""Lists the knobs of a dense layer: three tiles, for few, some and many rows, and where one takes
over from the other. The default is what ``dense_cost`` thinks fastest for 128, 1024 and 4096 rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

from bertile.schedules.cuda import precisions
from bertile.schedules.cuda.dense_cost import cycles
from bertile.schedules.cuda.dense_tile import Operands, Tile
from bertile.schedules.schedule import Gpu, Knobs, Row, Space
from bertile.schedules.task import Task

ENTRIES = {"few": 128, "some": 1024, "many": 4096}  # rows that their tiles are chosen for
ENDS: Space = {"few": (0, 192, 384, 768), "some": (0, 768, 1536, 3072)}  # rows from which not
WIDE: Space = {
    "rows": (32, 64, 128, 256),
    "columns": (32, 64, 96, 128, 192, 256),
    "tall": (1, 2, 4),
    "wide": (2, 4, 8),
    "slices": (1, 2),
    "stages": (2, 3, 4),
    "band": (1, 4, 16),
}
TILES: dict[str, Space] = {
    "few": {
        "rows": (16, 32, 64, 128),
        "columns": (16, 32, 48, 64, 96, 128),
        "tall": (1, 2, 4),
        "wide": (2, 4, 8),
        "slices": (1, 2, 4, 8),
        "stages": (2, 3, 4, 6, 8),
        "band": (1, 8),
    },
    "some": WIDE,
    "many": WIDE,
}


def space(task: Task, row: Row) -> Space:
    """A tile that a GPU cannot run stands for the nearest one that it can."""
    choices = dict(ENDS)
    for name in ENTRIES:
        choices |= {
            f"{name}_{key}": values for key, values in _choices(task, row.gpu, name).items()
        }
    return choices


def default(task: Task, row: Row) -> Knobs:
    """The tile that the cost prefers for each entry, and the first number of rows from which it
    prefers the next one.
    """
    chosen: Knobs = {}
    tiles = {}
    for name in ENTRIES:
        knobs, tiles[name] = _fastest(task, row.gpu, name)
        chosen |= {f"{name}_{key}": value for key, value in knobs.items()}
    for name, following in itertools.pairwise(ENTRIES):
        ends = [
            rows
            for rows in ENDS[name][1:]
            if cycles(tiles[following], rows, row.gpu) < cycles(tiles[name], rows, row.gpu)
        ]
        chosen[name] = min(ends, default=ENDS[name][-1])
    if tiles["some"] == tiles["many"]:
        chosen["some"] = 0  # one entry less to compile
    return chosen


def _choices(task: Task, gpu: Gpu, name: str) -> Space:
    """``tensor`` 1: wgmma."""
    grouped = gpu.wgmma and precisions.of(task).grouped and name != "few"
    return {**TILES[name], **({"tensor": (0, 1)} if grouped else {})}


@lru_cache(maxsize=256)
def _fastest(task: Task, gpu: Gpu, name: str) -> tuple[Knobs, Tile]:
    best: tuple[float, Knobs, Tile] | None = None
    for knobs in _candidates(task, gpu, name):
        tile = Tile.of(task, knobs, gpu)
        if any(getattr(tile, key) != knobs[key] for key in ("rows", "slices", "stages")):
            continue  # another point of the space is this tile
        taken = cycles(tile, ENTRIES[name], gpu)
        if best is None or taken < best[0]:
            best = taken, knobs, tile
    return best[1], best[2]


def _candidates(task: Task, gpu: Gpu, name: str) -> Iterator[Knobs]:
    """Tiles of 4 to 16 warps that their knobs divide; wgmma makes no difference of some knobs."""
    choices = _choices(task, gpu, name)
    choices["band"] = choices["band"][1:2]  # the cost does not tell bands apart
    most = Operands.of(task).columns
    wider = [columns for columns in choices["columns"] if columns >= most]
    choices["columns"] = tuple(c for c in choices["columns"] if c < most or c == wider[0])
    for values in itertools.product(*choices.values()):
        knobs = dict(zip(choices, values))
        tall, wide, slices = knobs["tall"], knobs["wide"], knobs["slices"]
        if knobs.get("tensor"):
            if (tall, wide, slices) == (4, 8, 1):
                yield knobs
            continue
        columns = min(knobs["columns"], most)
        down, across = knobs["rows"] // (16 * tall), columns // (8 * wide)
        divides = columns % (8 * wide) == 0 and tall * wide % slices == 0
        if divides and 4 <= down * across * slices <= 16:
            yield knobs
