"""What all schedules promise: a default inside the space, and refusal of foreign decisions."""

from __future__ import annotations

import numpy as np
import pytest

from bertile import targets
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task

TASKS = [
    Task("dense", {"inputs": 768, "outputs": 3072, "activation": "gelu", "residual": False}),
    Task("dense", {"inputs": 312, "outputs": 2, "activation": "none", "residual": True}),
    Task("attention", {"heads": 12, "head_size": 26, "scale": 0.2, "bias": True}),
    Task("layer_norm", {"channels": 313, "epsilon": 1e-12}),
    Task("embedding", {"channels": 26, "epsilon": 1e-5, "ids": "int64", "rows": "100"}),
    Task("rotary", {"channels": 78, "heads": 2, "head_size": 26}),
    *(Task(name, {"channels": 26}) for name in ("tokens_in", "tokens_out", "first_token")),
    *(Task(name, {"channels": 26}) for name in ("rows_in", "rows_out")),
    Task("narrow", {"channels": 26, "kind": "int8"}),
    Task(
        "sparse",
        {"inputs": 768, "outputs": 26, "activation": "none", "residual": True, "density": 10},
    ),
    Task("key_mask"),
    Task("query_bias"),
]
ALL = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
ROWS = pytest.mark.parametrize("row", targets.TABLE, ids=lambda row: row.name)


def test_every_schedule_is_tested_here():
    assert {task.operation for task in TASKS} == set(SCHEDULES)
    assert all(name == schedule.operation for name, schedule in SCHEDULES.items())


@ALL
@ROWS
def test_valid_accepts_the_default(task, row):
    schedule = SCHEDULES[task.operation]
    assert schedule.valid(task, row, schedule.default(task, row))


@ALL
def test_valid_declines_knobs_of_another_schedule(task):
    schedule, row = SCHEDULES[task.operation], targets.TABLE[0]
    assert not schedule.valid(task, row, {"warps": 4})
    assert not schedule.valid(task, row, {**schedule.default(task, row), "warps": 4})


@ALL
def test_valid_declines_missing_knobs_and_values_outside_the_space(task):
    schedule, row = SCHEDULES[task.operation], targets.TABLE[0]
    default = schedule.default(task, row)
    for knob in default:
        rest = {k: v for k, v in default.items() if k != knob}
        assert not schedule.valid(task, row, rest)
        assert not schedule.valid(task, row, {**default, knob: 1000})


def test_valid_declines_knobs_of_a_wider_machine():
    wide, narrow = targets.resolve("x86-avx512"), targets.resolve("x86-avx2")
    schedule, task = SCHEDULES["dense"], TASKS[0]
    assert not schedule.valid(task, narrow, schedule.default(task, wide))


def test_valid_declines_knobs_of_a_shape_that_they_do_not_divide():
    schedule, row = SCHEDULES["layer_norm"], targets.TABLE[0]
    assert schedule.valid(Task("layer_norm", {"channels": 768, "epsilon": 1e-12}), row, {"sums": 4})
    assert not schedule.valid(TASKS[3], row, {"sums": 4})


@ALL
def test_sample_is_the_same_for_the_same_seed(task):
    first, second = (
        SCHEDULES[task.operation].sample(task, 3, np.random.default_rng(5)) for _ in range(2)
    )
    for a, b in zip([*first.activations, *first.weights], [*second.activations, *second.weights]):
        assert np.array_equal(a, b)
    assert np.array_equal(first.expected, second.expected)
    assert np.isfinite(first.expected).all()


@ALL
def test_flops_grow_with_the_tokens(task):
    flops = SCHEDULES[task.operation].flops
    assert flops(task, 256) >= 2 * flops(task, 128) >= 0
