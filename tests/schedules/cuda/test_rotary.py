"""Rotary positions by themselves for GPUs, in the emulator, against numpy; what code takes."""

from __future__ import annotations

import pytest
from helpers import cuda_kernels
from helpers.cuda_kernels import slow

from bertile.schedules.task import Task

SHAPES = {
    "plain": {"channels": 31, "heads": 4, "head_size": 6},
    "normed": {"channels": 100, "heads": 3, "head_size": 20, "epsilon": 1e-6},
    "wide": {"channels": 3 * 256, "heads": 2, "head_size": 256, "epsilon": 1e-3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp16", "fp32", slow("bf16")])
def test_rotary_equals_numpy(precision, shape):
    task = Task("rotary", {**SHAPES[shape], "precision": precision})
    for blocks in (1, 3):
        assert cuda_kernels.mistake(task, blocks=blocks) is None


@pytest.mark.parametrize("shape", [slow("plain"), "wide"])
def test_a_head_stays_in_registers(shape):
    cuda_kernels.assert_fits(Task("rotary", {**SHAPES[shape], "precision": "fp16"}), "cuda-sm75")
