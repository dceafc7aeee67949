"""What a search times beside a model's own kernels."""

from __future__ import annotations

import pytest
from helpers.planned import BF16, PLAIN
from helpers.pruned_graphs import layers, pruned

from bertile.backends.cpu import precision_plan
from bertile.graph import importer, order
from bertile.lower import lowering
from bertile.lower.alternatives import alternatives
from bertile.lower.forms import Forms
from bertile.lower.sparse_choice import sparse_task
from bertile.schedules.task import Task
from bertile.tune.log.tuning_log import Record


@pytest.fixture(scope="module")
def graph(exported):
    return order.optimize(importer.import_onnx(exported))


class Log:
    """A log of one processor in which a kernel has taken the first time whose word it has."""

    def __init__(self, **times: float) -> None:
        self.times = times

    def best(self, task: Task, row: object) -> Record:
        words = (task.operation, task.shape.get("precision", "fp32"), "")
        time = next((self.times[word] for word in words if word in self.times), 100.0)
        place = ("x86-avx512", 2, 128, {}, (time,), {}, {}, "")
        return Record(task.operation, task.shape, *place)

    def shares(self, task: Task, other: Task, row: object) -> dict[int, float]:
        return {}


def test_no_kernel_is_instead_of_one_that_nothing_was_compared_with(graph):
    assert alternatives(precision_plan.plan_layers(graph, "int8", BF16)) == {}


@pytest.mark.parametrize(("row", "in_bytes"), [(BF16, "int8"), (PLAIN, "int8_bounded")])
@pytest.mark.parametrize(("sparse", "chosen"), [(50.0, True), (200.0, False)])
def test_a_layer_with_zeros_could_have_the_other_kernel(graph, row, in_bytes, sparse, chosen):
    some = pruned(graph, names=layers(graph)[:1])
    planned = precision_plan.plan_layers(some, "int8", row, Log(sparse=sparse), sparse="auto")
    ((other, own),) = alternatives(planned).items()
    assert (own.operation, other.operation) == (("sparse", "dense"), ("dense", "sparse"))[
        0 if chosen else 1
    ]
    dense, skipping = (other, own) if chosen else (own, other)
    assert skipping == sparse_task(dense, 10) and own in lowering.tasks(Forms(planned))
    assert dense.shape["precision"] == in_bytes and skipping.shape["precision"] == "int8"


def test_a_layer_that_was_slower_in_bytes_could_have_them_all_the_same(graph):
    log = Log(int8=20.0, bf16=15.0)
    planned = precision_plan.plan_layers(graph, "int8", BF16, log)
    others = alternatives(planned)
    asked = lowering.tasks(Forms(precision_plan.plan_layers(graph, "int8", BF16)))
    assert others and all(task in asked for task in others)
    assert {task.shape["precision"] for task in others} == {"int8"}
    assert {own.shape["precision"] for own in others.values()} == {"bf16"}
    assert set(others.values()) <= set(lowering.tasks(Forms(planned)))
