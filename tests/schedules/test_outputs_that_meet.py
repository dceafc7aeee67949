"""Products of which two outputs meet, gated or turned, against numpy; and how they are packed."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.spread import spread

from bertile.schedules import outputs_that_meet
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets import rows

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8_static", "int4")
ROWS = ("x86-avx512-bf16", "x86-avx2", "x86-amx")
# (operation, shape beside the inputs): what is gated, what is turned, with or without a rest
CASES = [
    ("dense", {"outputs": 96, "activation": "gelu", "gated": True}),
    ("dense", {"outputs": 26, "activation": "silu", "gated": True}),
    ("dense", {"outputs": 90, "turned": 6, "head_size": 10}),
    ("dense", {"outputs": 51, "turned": 2, "head_size": 10}),
    ("sparse", {"outputs": 96, "activation": "gelu", "gated": True, "density": 20}),
    ("sparse", {"outputs": 51, "turned": 2, "head_size": 10, "density": 30}),
    ("dense", {"outputs": 48, "activation": "gelu", "gated": True, "writes": "to_bf16"}),
    ("dense", {"outputs": 48, "activation": "none", "gated": True, "writes": "to_int8"}),
    ("sparse", {"outputs": 48, "gated": True, "writes": "to_int8", "density": 20}),
    ("dense", {"outputs": 60, "turned": 4, "head_size": 10, "writes": "to_bf16"}),
    ("sparse", {"outputs": 60, "turned": 4, "head_size": 10, "writes": "to_bf16", "density": 20}),
]


def task_of(operation, shape, precision="fp32"):
    whole = {"inputs": 37, "activation": "none", "residual": False, **shape}
    if precision != "fp32":
        whole["precision"] = precision
    if precision == "int4":
        whole["group"] = 32
    if "turned" in shape and "writes" in shape:  # for attention
        whole["values_from"] = shape["turned"] * shape["head_size"]
    return Task(operation, whole)


@pytest.fixture
def kernels(request, kernels_of):
    return kernels_of(request.param)


@spread("precision case", ROWS, PRECISIONS, range(len(CASES)), 6)
def test_product_equals_numpy(kernels, precision, case):
    operation, shape = CASES[case]
    if operation == "sparse" and precision == "int4":
        pytest.skip("there is no sparse kernel of 4 bits")
    for blocks in (1, 3, 7):
        assert kernels.mistake(task_of(operation, shape, precision), blocks) is None


@pytest.mark.parametrize("kernels", ROWS, indirect=True)
@pytest.mark.parametrize("case", [0, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_any_point_of_the_space_is_right(kernels, case):
    operation, shape = CASES[case]
    task = task_of(operation, shape, "int8_static" if case else "fp32")
    for knobs in kernels.points(task, 2, seed=case):
        assert kernels.mistake(task, 5, knobs) is None, knobs


def test_outputs_that_meet_are_packed_side_by_side():
    gated = task_of("dense", {"outputs": 6, "activation": "gelu", "gated": True})
    assert outputs_that_meet.order(gated).tolist() == [0, 3, 1, 4, 2, 5]
    turned = task_of("dense", {"outputs": 10, "turned": 2, "head_size": 4})
    assert outputs_that_meet.order(turned).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9]
    w = np.arange(6, dtype="float32")
    first, second = outputs_that_meet.ordered(gated, [w[None], w])
    assert first.tolist() == [[0, 3, 1, 4, 2, 5]] and second.tolist() == first[0].tolist()


def test_what_does_not_meet_is_packed_as_it_lies():
    plain = task_of("dense", {"outputs": 6})
    w = np.arange(6, dtype="float32")
    assert outputs_that_meet.ordered(plain, [w])[0] is w


@pytest.mark.parametrize("row", rows.TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_default_lies_in_its_own_space(row, case):
    operation, shape = CASES[case]
    schedule, task = SCHEDULES[operation], task_of(operation, shape)
    assert schedule.valid(task, row, schedule.default(task, row))


def test_a_gate_takes_no_part_of_its_inputs_alone():
    """The sums of one part would wait in y, where those of two outputs have no room."""
    row = rows.resolve("x86-avx512", 1)
    shape = {"inputs": 512, "outputs": 64, "activation": "gelu", "residual": False}
    passes = SCHEDULES["dense"].space(Task("dense", shape), row)["passes"]
    gated = SCHEDULES["dense"].space(Task("dense", {**shape, "gated": True}), row)["passes"]
    assert (passes, gated) == ((1, 2), (1,))
