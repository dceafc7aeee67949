"""Tasks are equal by meaning, and their names are identifiers."""

from __future__ import annotations

import json

import pytest

from bertile.schedules.task import Task

DENSE = {"inputs": 768, "outputs": 3072, "activation": "gelu", "residual": False}


def test_key_ignores_the_order_of_the_shape():
    backwards = dict(reversed(DENSE.items()))
    assert Task("dense", DENSE).key == Task("dense", backwards).key
    assert Task("dense", DENSE) == Task("dense", backwards)
    assert len({Task("dense", DENSE), Task("dense", backwards)}) == 1


def test_key_survives_a_round_trip_through_json():
    task = Task("dense", DENSE)
    assert Task(*json.loads(task.key)) == task


@pytest.mark.parametrize(
    "other",
    [
        Task("dense", {**DENSE, "outputs": 768}),
        Task("dense", {**DENSE, "residual": True}),
        Task("dense", {**DENSE, "activation": "gelu_tanh"}),
        Task("sparse", DENSE),
    ],
    ids=lambda task: task.name,
)
def test_tasks_differ_when_what_they_compute_differs(other):
    assert Task("dense", DENSE) != other
    assert Task("dense", DENSE).key != other.key


def test_task_is_no_string():
    assert Task("dense", DENSE) != Task("dense", DENSE).key


@pytest.mark.parametrize(
    "task,name",
    [
        (Task("dense", DENSE), "dense_768_3072_gelu"),
        (
            Task("dense", {**DENSE, "activation": "none", "residual": True}),
            "dense_768_3072_residual",
        ),
        (Task("attention", {"heads": 12, "scale": 0.125, "bias": True}), "attention_12_0p125_bias"),
        (Task("layer_norm", {"channels": 768, "epsilon": 1e-12}), "layer_norm_768_1em12"),
        (Task("key_mask"), "key_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_name_is_a_readable_identifier(task, name):
    assert task.name == name
    assert task.name.isidentifier()


def test_task_cannot_be_changed():
    with pytest.raises(AttributeError):
        Task("dense", DENSE).operation = "sparse"
