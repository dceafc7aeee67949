"""Estimates how long a dense kernel takes by its bytes and multiply-adds, for choosing a default:
cycles of a multiprocessor. The rates are vendors' and others' published ones; nothing here was
measured.
"""

from __future__ import annotations

from bertile.schedules.cuda.dense_tile import PANEL, Tile
from bertile.schedules.schedule import Gpu

# Multiply-adds of a multiprocessor in a cycle: 16-bit by mma.sync, float32 without tensor cores.
TENSOR = {75: 512, 80: 1024, 86: 512, 89: 512, 90: 1280}
GROUPED = 1800  # 16-bit by wgmma
PLAIN = {75: 64, 80: 64, 86: 128, 89: 128, 90: 128}
SHARED = 128  # bytes of shared memory in a cycle
PORT = 64  # bytes that a multiprocessor can take from the second-level cache in a cycle
CACHE = 32  # bytes of the second-level cache in a cycle, for each multiprocessor when all ask
LATENCY = 800  # of a read that misses the second-level cache
START = 1500  # from the launch to the first read, and from the last write to the end
BARRIER = 40  # of an iteration: waiting, and the first reads of the next slot
FINISH = 6  # instructions of a value in the epilogue, without its activation
ACTIVATION = {"none": 0, "relu": 1, "gelu": 16, "gelu_tanh": 10, "tanh": 20, "silu": 10}


def cycles(tile: Tile, rows: int, gpu: Gpu) -> float:
    """About how long one launch for so many rows takes."""
    of = tile.operands
    across, down = -(-of.columns // tile.columns), -(-rows // tile.rows)
    blocks = across * down
    resident = tile.resident(gpu)
    waves = -(-blocks // gpu.multiprocessors)  # blocks of the busiest multiprocessor
    together = min(resident, waves)
    panels = tile.iterations * tile.slices
    read = (tile.rows + tile.columns) * PANEL * panels
    fragments = _lines(tile) * PANEL * panels
    multiplies = tile.rows * tile.columns * panels * (PANEL // of.size)
    in_flight = (tile.stages - 1) * tile.slot * together
    value = tile.rows * tile.columns
    ends = value * (FINISH + ACTIVATION[of.activation]) / 128 + (
        value * tile.slices * 8 / SHARED if tile.slices > 1 else 0
    )
    each = _together(
        multiplies / rate(tile, gpu, together),
        (fragments + read) / SHARED,
        read / min(PORT, in_flight / LATENCY),
        tile.iterations * LATENCY / (tile.stages - 1) / together,
    )
    each += tile.iterations * BARRIER * (1 / together + 1 / (tile.stages - 1))
    alone = ends if together == 1 else ends / 2  # others multiply meanwhile
    busy = waves * (each + alone) + LATENCY * -(-waves // resident)
    return START + max(busy, blocks * read / (CACHE * gpu.multiprocessors))


def _lines(tile: Tile) -> int:
    """Lines of 128 bytes that are read of a panel in shared memory; a lane without tensor cores
    reads its 16 bytes in two turns, of columns half as many at once.
    """
    if tile.grouped:
        return tile.rows // 64 * (64 + tile.columns)
    if not tile.operands.precision.multiply:
        return tile.warps * 32 * (tile.tall + tile.wide)
    return tile.warps * (16 * tile.tall + 8 * tile.wide)


def _together(*parts: float) -> float:
    """Of units that work side by side: hardly more than the slowest, if the others are fast."""
    return sum(part**3 for part in parts) ** (1 / 3)


def rate(tile: Tile, gpu: Gpu, together: int) -> float:
    """Multiply-adds in a cycle, of so many blocks that a multiprocessor has together: four warps
    keep its tensor cores busy, eight hide each other's waits.
    """
    precision, warps = tile.operands.precision, together * tile.threads / 32
    if tile.grouped:
        return GROUPED * precision.rate
    busy = min(1.0, warps / 4) * (0.85 if warps < 8 else 1.0)
    if not precision.multiply:
        return PLAIN[gpu.capability] * busy
    return TENSOR[gpu.capability] * precision.rate * busy
