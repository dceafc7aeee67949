"""The tuning logs that ship for ARM: made by llvm-mca's estimate, for the spaces of today."""

from __future__ import annotations

import pytest

from bertile.schedules.cpu import SCHEDULES
from bertile.targets.rows import resolve
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import SURE, TuningLog


@pytest.fixture(params=["arm-a72", "arm-a76", "arm-v1", "arm-v2"])
def row(request):
    return resolve(request.param, threads=4)


@pytest.fixture
def log(tmp_path):
    """What ships, and nothing of the user's; a line that is no record fails the test."""
    return TuningLog.open(str(tmp_path), pytest.fail)


def test_records_are_estimates_of_points_of_the_space(log, row):
    for task in log.tasks(row):
        for record in log.records(task, row):
            assert record.estimated and record.error is None and record.threads == 4
            assert SCHEDULES[task.operation].valid(task, row, record.knobs), (task.name, record)


def test_every_kind_of_kernel_and_precision_of_the_row_is_there(log, row):
    tasks = log.tasks(row)
    assert {"dense", "layer_norm", "embedding"} <= {task.operation for task in tasks}
    precisions = {
        task.shape.get("precision", "fp32") for task in tasks if task.operation == "dense"
    }
    assert precisions >= {"fp32", *(["bf16", "int8"] if row.bf16 else [])}
    widths = {task.shape["inputs"] for task in tasks if task.operation == "dense"}
    assert widths == {384, 768, 1536, 3072}  # MiniLM's and BERT-base's


def test_what_is_chosen_is_estimated_to_be_faster_than_the_default(log, row):
    for task in log.tasks(row):
        best, knobs = log.best(task, row), SCHEDULES[task.operation].default(task, row)
        (default,) = [record for record in log.records(task, row) if dict(record.knobs) == knobs]
        assert Chooser(log, row, pytest.fail).choose(task)[:2] == ("estimated", dict(best.knobs))
        assert best == default or default.median >= SURE * best.median, task.name
