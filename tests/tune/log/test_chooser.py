"""Where a kernel's knobs come from: its own record, a near one, the default; all trusted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.records import ROW, record

from bertile.base.errors import ModelError
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log import chooser
from bertile.tune.log.chooser import Chooser, distance
from bertile.tune.log.tuning_log import Record, TuningLog


def task(inputs: int = 768, outputs: int = 768, activation: str = "none") -> Task:
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": False}
    return Task("dense", shape)


def attention(size: int, precision: str) -> Task:
    shape = {"heads": 1, "head_size": size, "scale": 0.0625, "bias": False}
    return Task("attention", {**shape, "precision": precision})


NORM = Task("layer_norm", {"channels": 8192, "epsilon": 1e-12, "precision": "fp16"})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def chosen(tmp_path, said):
    def choose(of: Task, *records: Record) -> chooser.Choice:
        log = TuningLog([tmp_path], said.append)
        for added in records:
            log.append(added)
        return Chooser(log, ROW, said.append).choose(of)

    return choose


def test_empty_log_gives_the_default(chosen):
    assert chosen(task()) == ("default", SCHEDULES["dense"].default(task(), ROW), None)


def test_estimated_record_is_named_so_and_comes_behind_measured_ones(chosen):
    guess = replace(record(task(), chunk=8), estimated=True, microseconds=(1.0,))
    assert chosen(task(), guess) == ("estimated", guess.knobs, guess)
    far, near = record(task(768, 3072), chunk=4), record(task(768, 1536), chunk=32)
    choice = chosen(task(768, 1024), far, replace(near, estimated=True))
    assert choice.source == "nearest" and choice.knobs["chunk"] == 4


def test_own_record_comes_first(chosen):
    choice = chosen(task(), record(task(), chunk=8), record(task(768, 3072), chunk=32))
    assert choice.source == "tuned" and choice.knobs["chunk"] == 8


def test_nearest_shape_comes_before_the_default(chosen):
    choice = chosen(task(1024, 1024), record(task(), chunk=8), record(task(768, 3072), chunk=32))
    assert choice.source == "nearest" and choice.knobs["chunk"] == 8


def test_nearest_with_invalid_knobs_is_passed_over(chosen):
    # 13 inputs cannot be unrolled by 4, which the nearest record wants
    bad, good = record(task(26, 768), unroll=2), record(task(39, 768), unroll=1, chunk=32)
    choice = chosen(task(13, 768), bad, good)
    assert choice.source == "nearest" and choice.knobs["chunk"] == 32


def test_far_shape_is_not_taken(chosen):
    assert chosen(task(64, 64), record(task(4096, 4096))).source == "default"


def test_other_operation_is_never_near():
    assert distance(task(), Task("layer_norm", {"channels": 768, "epsilon": 1e-12})) == float("inf")


def test_other_epilogue_is_near_but_not_equal():
    assert 0 < distance(task(), task(activation="gelu")) < distance(task(), task(2 * 768))


def test_record_of_another_tvm_is_checked_and_used(chosen, said):
    small = task(32, 24)
    assert chosen(small, record(small, tvm="0.1", chunk=8)).source == "tuned" and not said


def test_record_of_another_tvm_that_computes_wrong_is_left_out(chosen, said, monkeypatch):
    small = task(32, 24)
    answer = {"error": "wrong result: off by 1"}
    monkeypatch.setattr(chooser.TrialRunner, "run", lambda *args, **kwargs: answer)
    assert chosen(small, record(small, tvm="0.1", chunk=8)).source == "default"
    assert len(said) == 1 and "wrong result" in said[0]


def test_knobs_outside_of_the_space_are_never_used(chosen):
    broken = replace(record(task()), knobs={"accumulators": 4000})
    assert chosen(task(), broken).source == "default"


@pytest.mark.parametrize(
    ("wide", "row", "narrower"),
    [(attention(256, "fp32"), "cuda-sm75", attention(256, "fp16")), (NORM, "cuda-sm90", None)],
    ids=["attention", "layer_norm"],
)
def test_task_that_no_kernel_fits_is_refused_with_the_way_out(tmp_path, wide, row, narrower):
    row = resolve(row)
    choose = Chooser(TuningLog([tmp_path], print), row, print)
    text = f"no kernel of {wide.name} fits {row.name}; compile in another precision, or for another"
    with pytest.raises(ModelError, match=text):
        choose.knobs(wide)
    assert narrower is None or choose.knobs(narrower)
