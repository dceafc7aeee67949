"""What kernels of the defaults move: no bank conflicts in their loops, no sector read in vain."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.run.cuda import emulator
from bertile.schedules import schedules_for
from bertile.schedules.task import Task
from bertile.targets import rows

DENSE = {"inputs": 384, "outputs": 384, "activation": "gelu", "residual": True}
ATTENTION = {"heads": 4, "head_size": 64, "scale": 0.125, "bias": False}


@pytest.mark.parametrize(
    ("row", "task", "blocks"),
    [
        ("cuda-sm80", Task("dense", {**DENSE, "precision": "fp16"}), 8),
        ("cuda-sm90", Task("dense", {**DENSE, "precision": "fp16"}), 128),  # wgmma
        ("cuda-sm80", Task("dense", {**DENSE, "precision": "int8"}), 8),
        ("cuda-sm80", Task("attention", {**ATTENTION, "precision": "bf16"}), 8),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else str(value),
)
def test_nothing_is_moved_in_vain(row: str, task: Task, blocks: int) -> None:
    by_way, multiplications = moved(row, task, blocks)
    assert multiplications > 0
    assert bool(by_way["load_matrix read"].instructions) == (row != "cuda-sm90")
    for way, traffic in by_way.items():
        most = 1.15 if way.startswith("shared") else 1.0  # vectors of a tile are read by few lanes
        assert traffic.parts <= most * traffic.least, (way, traffic)


@pytest.mark.parametrize("few", [0, 512])  # a warp to a row, or several
@pytest.mark.parametrize("channels", [128, 384, 768, 1024])
def test_layer_norm_moves_nothing_in_vain(channels: int, few: int) -> None:
    shape = {"channels": channels, "epsilon": 1e-12, "precision": "fp16"}
    by_way, _ = moved("cuda-sm80", Task("layer_norm", shape), 2, few=few)
    assert by_way["shared read"].bytes >= 32 * 2 * 4 * channels  # gamma and beta for each row
    assert all(traffic.parts == traffic.least for traffic in by_way.values()), by_way


def moved(
    row: str, task: Task, blocks: int, **changed: int
) -> tuple[dict[str, emulator.Traffic], int]:
    """What the default, with these knobs changed, moves, and how often tensor cores multiply."""
    target = rows.resolve(row)
    schedule = schedules_for(target)[task.operation]
    knobs = {**schedule.default(task, target), **changed}
    sample = schedule.sample(task, blocks, np.random.default_rng(0))
    weights = schedule.pack(task, knobs, sample.weights, target)
    kernel, results = schedule.kernel(task, knobs, target), sample.buffers()
    arrays = [*sample.activations, *weights, *results]
    counts = emulator.count_traffic(kernel, arrays, sample.symbols)
    assert sample.mistake(results) is None
    return counts
