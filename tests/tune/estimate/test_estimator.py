"""An estimate knows loops, caches and threads, and gives a measured record the last word."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bertile.base.errors import PlatformError
from bertile.base.progress import Progress
from bertile.cli import main
from bertile.config import Config
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import native, resolve
from bertile.tune.estimate import loop_marks, mca
from bertile.tune.estimate.estimator import Code, Estimator, blocks, together
from bertile.tune.estimate.loop_walk import Walk
from bertile.tune.log.tuning_log import TuningLog
from bertile.tune.search import tuner

DENSE = Task("dense", {"inputs": 64, "outputs": 48, "activation": "none", "residual": False})
KNOBS = {
    "accumulators": 8,
    "token_blocks": 2,
    "unroll": 4,
    "passes": 1,
    "panels": 4,
    "chunk": 8,
    "order": 0,
}
HERE, QUIET = native(), Progress(verbosity=-1)


def walked(task: Task, knobs: dict[str, int], threads: int = 1, count: int = 4):
    schedule = SCHEDULES[task.operation]
    func, marks = loop_marks.marked(schedule.kernel(task, knobs, HERE), "#")
    sample = schedule.sample(task, count, np.random.default_rng(0))
    arguments = [*sample.activations, *schedule.pack(task, knobs, sample.weights, HERE)]
    return Walk(func, marks, (1 << 15, 1 << 20), threads, HERE).passes(
        [*arguments, *sample.buffers()]
    )


def test_marks_are_passed_as_often_as_the_loops_say():
    """12 panels of 4 outputs by 2 tiles of 2 blocks: 24 tiles, each 16 times 4 channels."""
    passes = walked(DENSE, KNOBS).marks
    assert max(passes) == 24 * 16 and 24 in passes
    assert max(walked(DENSE, KNOBS, count=8).marks) == 48 * 16


def test_threads_share_the_passes_but_not_the_weights_of_a_job():
    """Three groups of panels: of two threads one has two of them."""
    assert max(walked(DENSE, KNOBS, threads=2).marks) == 16 * 16


def test_every_line_is_fetched_once_where_the_cache_holds_all():
    fetched = walked(DENSE, KNOBS).fetched
    lines = 4 * 64 + 4 * 48 + 64 * 48 * 4 // 64 + 48 * 4 // 64
    assert fetched[1] == pytest.approx(lines, abs=4)
    assert fetched[0] >= fetched[1]


def test_sparse_loops_are_as_long_as_their_lists():
    shape = {"inputs": 64, "outputs": 48, "activation": "none", "residual": False}
    few, many = (Task("sparse", {**shape, "density": percent}) for percent in (10, 60))
    default = SCHEDULES["sparse"].default
    ours, theirs = (max(walked(task, default(task, HERE)).marks) for task in (few, many))
    assert 3 * ours < theirs


def test_assembly_is_cut_at_labels_and_branches():
    pieces = blocks(
        "f:\n\t.cfi_startproc\n\t//APP\n\t// bertile-mark 0\n\t//NO_APP\n\tmov x0, x1\n"
        "\tcbz x0, .LBB0_2\n\tadd x0, x0, #1\n.LBB0_2:\n\tret\n"
    )
    assert [(len(block.instructions), block.marks) for block in pieces] == [
        (2, [0]),
        (1, []),
        (1, []),
    ]
    code = Code(None, 1, pieces)
    assert code.times([5]) == [5, 5, 5]


def test_copied_loop_is_passed_as_often_as_what_comes_behind_it():
    """The loop (mark 0) of 6 full panels (mark 1), and LLVM's copy of it for a padded one (2)."""
    loop = "\t# bertile-mark 0\n\tadd %eax, %ebx\n\tjne .L{0}\n"
    pieces = blocks(
        ".La:\n" + loop.format("a") + "\tjmp .Lc\n.Lb:\n" + loop.format("b") + ".Ld:\n"
        "\t# bertile-mark 2\n\tnop\n\tretq\n.Lc:\n\t# bertile-mark 1\n\tnop\n\tjmp .Lb\n"
    )
    names = [(block.labels, block.marks) for block in pieces if block.marks]
    assert names == [([".La"], [0]), ([".Lb"], [0]), ([".Ld"], [2]), ([".Lc"], [1])]
    times = Code(None, 3, pieces).times([70, 6, 1])
    passes = {block.labels[0]: count for block, count in zip(pieces, times) if block.labels}
    assert passes == pytest.approx({".La": 60, ".Lb": 10, ".Ld": 1, ".Lc": 6})


@pytest.mark.usefixtures("llvm_mca")
def test_padded_panels_are_not_thought_to_be_faster():
    """98 / 5 outputs: of 20 panels the last one has but 3, in a loop that LLVM makes for it."""
    row = resolve("x86-avx512-vnni", 1)
    shape = {**DENSE.shape, "inputs": 256, "outputs": 98, "precision": "int8"}
    knobs = {**KNOBS, "accumulators": 10, "unroll": 1, "panels": 8, "chunk": 4}
    with Estimator(row) as estimator:
        microseconds = estimator.run(Task("dense", shape), knobs, 8)["microseconds"][0]
    assert microseconds > 128 * 256 * 98 / 64 / mca.model_of(row).gigahertz / 1e3


def test_two_limits_at_once_cost_more_than_one():
    assert together(100.0, 10.0) == pytest.approx(100.0, rel=1e-3)
    assert 105 < together(100.0, 100.0) < 120


@pytest.mark.usefixtures("llvm_mca")
@pytest.mark.parametrize("row", ["arm-a72", "arm-a76", "x86-avx512"])
def test_estimate_lies_near_the_peak_of_the_pipes(row):
    """A dense layer of a good tile: between the peak and a third more than it."""
    target, task = resolve(row, 1), Task("dense", {**DENSE.shape, "inputs": 256, "outputs": 96})
    per_cycle = {"arm-a72": 4, "arm-a76": 8, "x86-avx512": 16}[row]
    default = SCHEDULES["dense"].default(task, target)
    with Estimator(target) as estimator:
        estimate = estimator.run(task, default, 8, (1,))
        clock = estimator._model.gigahertz
    best = 128 * 256 * 96 / per_cycle / clock / 1e3
    assert "llvm-mca" in estimate["machine"]["cpu"] and set(estimate["also"]) == {"16"}
    assert best < estimate["microseconds"][0] < 1.34 * best


@pytest.mark.usefixtures("llvm_mca", "no_slow_spells")
def test_tuning_by_estimate_is_said_so_and_a_measured_record_wins(tmp_path):
    log = TuningLog([tmp_path], lambda text: None)
    row = replace(HERE, threads=1)

    def trials(runner: str) -> int:
        config = Config(tune="quick", runner=runner)
        return tuner.tune(Counter(), log, row, config, QUIET, {DENSE: None})["trials"]

    assert trials("mca") == 1
    guess = log.best(DENSE, row)
    assert guess.estimated and "llvm-mca" in guess.machine["cpu"] and len(guess.also) == 2
    assert trials("local") == 1 and trials("mca") == 0
    log.append(replace(log.best(DENSE, row), microseconds=(1e6,), also={}))
    assert not log.best(DENSE, row).estimated


def test_knobs_that_failed_on_a_machine_are_not_chosen_by_estimate(tmp_path):
    from helpers.records import record

    log, row = TuningLog([tmp_path], lambda text: None), HERE
    log.append(replace(record(DENSE, chunk=8), estimated=True))
    log.append(replace(record(DENSE, chunk=8), microseconds=(), error="crashed"))
    assert log.best(DENSE, row) is None
    log.append(replace(record(DENSE, chunk=4), estimated=True))
    assert log.best(DENSE, row).knobs["chunk"] == 4


def test_kernels_of_another_machine_are_not_measured_here(capsys, tmp_path):
    """Said before the search begins, with what can be done instead."""
    with pytest.raises(PlatformError, match=r"cannot be measured on this machine; .*--runner mca"):
        log = TuningLog([tmp_path], lambda text: None)
        tuner.tune(Counter({DENSE: 1}), log, resolve("arm-a72"), Config(tune="quick"), QUIET)
    assert main.main(["tune", "minilm", "--runner", "mac"]) == 2
    assert "did you mean 'mca'" in capsys.readouterr().err
