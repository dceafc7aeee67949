"""A log knows which processor it speaks of: there its records count, elsewhere they are a prior."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record

from bertile import driver
from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.config import Config
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets import rows
from bertile.targets.rows import native
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import ELSEWHERE, ESTIMATED, TUNED, Record, TuningLog, fair_time
from bertile.tune.search import tuner

ROW = native()
TASK = Task("dense", {"inputs": 64, "outputs": 48, "activation": "none", "residual": False})
OTHER = Task("dense", {"inputs": 64, "outputs": 96, "activation": "none", "residual": False})
DEFAULT = SCHEDULES["dense"].default(TASK, ROW)
SPACE = SCHEDULES["dense"].space(TASK, ROW)
POINTS = [dict(zip(SPACE, values)) for values in itertools.product(*SPACE.values())]
PRIOR, *OTHERS = (
    point
    for point in POINTS
    if point["chunk"] != DEFAULT["chunk"] and SCHEDULES["dense"].valid(TASK, ROW, point)
)
ZEN4, ZEN5 = ({"cpu": f"AMD EPYC, cpu family {family}, model 17"} for family in (25, 26))
HERE = {"cpu": "AMD EPYC 9R45, cpu family 26, model 17", "caches": "L1 48K, L2 1024K"}
XEON = {"cpu": "Intel(R) Xeon(R) Processor, cpu family 6, model 143"}


class Pretended:
    """Answers trials at once: ``times`` by a candidate's chunk, slower in the calls that ``slow``
    numbers.
    """

    parallel = 1

    def __init__(self, times: Mapping[int, float], slow: Sequence[int] = ()) -> None:
        self.times, self.slow, self.calls = dict(times), set(slow), []

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def run(self, task: Task, knobs: Mapping[str, int], blocks: int, also: Any = ()) -> dict:
        factor = 2.0 if len(self.calls) in self.slow else 1.0
        self.calls.append((task, dict(knobs)))
        time = 50.0 if task == tuner.REFERENCE else self.times.get(knobs["chunk"], 9.0)
        return {"microseconds": [time * factor] * 3, "also": {}}

    def tried(self, task: Task) -> list[dict]:
        return [knobs for tried, knobs in self.calls if tried == task]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(tuner, "PAUSE", 0.0)
    monkeypatch.setattr(tuner, "processor", lambda: HERE)


def logged(directory: Path, *records: Record) -> TuningLog:
    log = TuningLog([directory], pytest.fail, HERE)
    for entry in records:
        log.append(entry)
    return log


def measured(machine: Mapping[str, Any], microseconds: float, other: int | None = None) -> Record:
    """Of the prior's knobs, or of others by number."""
    entry = record(TASK, **(PRIOR if other is None else OTHERS[other]))
    return dataclasses.replace(entry, machine=machine, microseconds=(microseconds,))


def tune(log: TuningLog, runner: Pretended, tasks=(TASK,), **choices: Any) -> dict[str, Any]:
    config = Config(**{"tune": "quick", **choices})
    counts = Counter(dict.fromkeys(tasks, 1))
    return tuner.tune(counts, log, ROW, config, Progress(verbosity=-1), {}, lambda *_: runner)


@pytest.mark.parametrize(
    ("machine", "estimated", "origin"),
    [
        ({"cpu": "AMD EPYC, cpu family 26, model 17"}, False, TUNED),
        ({"cpu": HERE["cpu"], "caches": HERE["caches"]}, False, TUNED),
        ({"cpu": HERE["cpu"], "caches": "L1 48K, L2 512K"}, False, ELSEWHERE),
        (ZEN4, False, ELSEWHERE),
        ({"cpu": "cpu family 26, model 17"}, False, ELSEWHERE),
        ({}, False, ELSEWHERE),
        (HERE, True, ESTIMATED),
    ],
)
def test_record_counts_as_tuned_on_its_own_processor(tmp_path, machine, estimated, origin):
    entry = dataclasses.replace(measured(machine, 5.0), estimated=estimated)
    assert logged(tmp_path, entry).origin(entry, ROW) == origin


def test_record_for_a_row_that_does_not_run_here_is_not_asked_for_its_processor(tmp_path):
    foreign = rows.resolve("arm-a76" if ROW.arch != "aarch64" else "x86-avx2")
    assert logged(tmp_path).origin(measured(XEON, 5.0), foreign) == TUNED


def test_build_takes_this_machine_then_the_most_like_it_then_estimates(tmp_path):
    estimate = dataclasses.replace(measured(HERE, 1.0, 1), estimated=True)
    log = logged(tmp_path, estimate)
    assert log.best(TASK, ROW) == estimate
    nearer = {"cpu": "AMD EPYC, cpu family 26, model 2"}
    for number, machine in enumerate((XEON, ZEN4, nearer), 2):
        entry = measured(machine, 2.0 * number, number)  # each slower than the one before
        log.append(entry)
        assert log.best(TASK, ROW) == entry
        choice = Chooser(log, ROW, pytest.fail).choose(TASK)
        assert choice == (ELSEWHERE, dict(entry.knobs), entry)
    log.append(own := measured(HERE, 99.0))
    assert log.best(TASK, ROW) == own
    assert Chooser(log, ROW, pytest.fail).choose(TASK).source == TUNED
    assert TuningLog([tmp_path], pytest.fail, HERE).best(TASK, ROW) == own  # read again


def test_near_shape_of_this_machine_goes_before_one_of_another(tmp_path):
    near = dataclasses.replace(measured(ZEN4, 5.0), shape={**TASK.shape, "outputs": 64})
    far = dataclasses.replace(measured(HERE, 5.0), shape={**TASK.shape, "outputs": 192})
    far = dataclasses.replace(far, knobs=DEFAULT)
    log = logged(tmp_path, near, far)
    assert Chooser(log, ROW, pytest.fail).choose(TASK)[:2] == ("nearest", dict(DEFAULT))


def test_other_machines_records_are_tried_first_and_stop_no_search(tmp_path):
    log = logged(tmp_path, *(measured(ZEN4, 3.0, n) for n in (1, 2, 4)), measured(ZEN4, 2.0))
    runner = Pretended({PRIOR["chunk"]: 4.0, DEFAULT["chunk"]: 5.0})
    assert tune(log, runner, trials=6)["trials"] >= 6
    assert runner.tried(TASK)[:2] == [dict(PRIOR), dict(DEFAULT)]
    assert len(log.tuned(TASK, ROW)) >= 6
    again = Pretended({})
    assert tune(log, again, trials=6)["trials"] == 0 and not again.calls


def test_auto_measures_prior_and_default_of_what_another_processor_tuned(tmp_path):
    log = logged(tmp_path, measured(ZEN4, 3.0))
    assert tuner.unsettled([TASK, OTHER], log, ROW) == [TASK]
    runner = Pretended({PRIOR["chunk"]: 7.0, DEFAULT["chunk"]: 5.0})
    result = tune(log, runner, (TASK, OTHER), tune="auto")
    assert result["trials"] == 2 and not runner.tried(OTHER)
    best = log.best(TASK, ROW)
    assert dict(best.knobs) == DEFAULT and log.origin(best, ROW) == TUNED
    assert not tuner.unsettled([TASK, OTHER], log, ROW)
    assert tune(log, Pretended({}), tune="quick", trials=5)["trials"] >= 3  # two are known


def test_prior_that_is_the_default_has_nothing_to_be_compared_with(tmp_path):
    entry = dataclasses.replace(measured(ZEN4, 3.0), knobs=DEFAULT)
    assert not tuner.unsettled([TASK], logged(tmp_path, entry), ROW)


def test_round_in_a_slow_spell_is_measured_again(tmp_path):
    """The reference takes twice its time behind the round, which is repeated when it is over."""
    log = logged(tmp_path, measured(ZEN4, 3.0))
    runner = Pretended({PRIOR["chunk"]: 4.0, DEFAULT["chunk"]: 5.0}, slow=(1, 2, 3))
    result = tune(log, runner, trials=2)
    assert "2 of them again after a slow spell" in result["text"]
    entries = log.tuned(TASK, ROW)[:4]
    assert [e.median for e in entries] == [8.0, 10.0, 4.0, 5.0]  # what was measured stays, too
    assert [e.reference for e in entries] == [50.0] * 4
    assert dict(log.best(TASK, ROW).knobs) == PRIOR


def test_spell_that_does_not_end_is_waited_for_in_vain(tmp_path):
    log = logged(tmp_path, measured(ZEN4, 3.0))
    runner = Pretended({}, slow=range(1, 1000))
    tune(log, runner, trials=2)
    searched = [e for e in log.tuned(TASK, ROW) if e.turn is None]
    assert len([e for e in searched if dict(e.knobs) == DEFAULT]) == tuner.REPEATS
    assert {e.reference for e in searched} == {50.0, 100.0}


def test_times_are_not_divided_by_what_the_reference_took(tmp_path):
    """A slow spell may have ended between the reference and a trial: 8 of one are no 4."""
    fast = dataclasses.replace(measured(HERE, 6.0), reference=50.0)
    slow = dataclasses.replace(measured(HERE, 8.0, 1), reference=100.0)
    assert logged(tmp_path, fast, slow).best(TASK, ROW) == fast
    ended = dataclasses.replace(measured(HERE, 5.0, 2), reference=100.0)
    assert logged(tmp_path / "ended", fast, slow, ended).best(TASK, ROW) == ended
    old = dataclasses.replace(measured(HERE, 3.0, 3), reference=None)
    assert logged(tmp_path / "old", fast, slow, ended, old).best(TASK, ROW) == old


def test_lengths_count_as_the_mix_says(tmp_path):
    row = dataclasses.replace(ROW, mix=((16, 1.0), (128, 2.0), (384, 1.0)))
    short = dataclasses.replace(measured(HERE, 110.0), also={"16": (8.0,), "384": (300.0,)})
    usual = dataclasses.replace(measured(HERE, 100.0, 1), also={"16": (9.0,), "384": (310.0,)})
    assert fair_time(usual, row) == pytest.approx((9 * 100**2 * 310) ** 0.25)
    log = logged(tmp_path, short, usual)
    assert log.best(TASK, row) == usual
    assert log.best(TASK, rows.with_lengths(row, (16,))) == short
    assert log.best(TASK, rows.with_lengths(row, (128,))) == usual
    half = dataclasses.replace(measured(HERE, 1.0, 2))  # not of all lengths
    log.append(half)
    assert log.best(TASK, row) == usual


def test_row_is_measured_on_the_lengths_that_a_model_takes():
    assert rows.with_lengths(ROW, None, 512).also_blocks == (1, 24)
    assert rows.with_lengths(ROW, None, 8192).also_blocks == (1, 24, 128)
    assert rows.with_lengths(ROW, None, 1000).also_blocks == (1, 24, 63)
    assert rows.with_lengths(ROW, None, None).also_blocks == (1, 24, 128)
    asked = rows.with_lengths(ROW, (16, 128, 128), 8192)
    assert asked.also_blocks == (1,) and dict(asked.mix) == {16: 1.0, 128: 2.0}
    gpu = rows.resolve("cuda-sm90")
    assert rows.with_lengths(gpu, None, 8192) == gpu


@pytest.mark.parametrize("lengths", ["", "16,", "a", (0,), (10**6,), 16])
def test_lengths_that_are_none_are_refused(lengths):
    with pytest.raises(UsageError, match="lengths is"):
        Config(lengths=lengths)
    assert Config(lengths="16,128").lengths == (16, 128)


@pytest.mark.slow
def test_compile_settles_what_another_processor_tuned_once(tmp_path, stages, monkeypatch):
    monkeypatch.setattr("bertile.base.machine.processor", lambda: HERE)
    monkeypatch.setitem(tuner.EFFORTS, "auto", tuner.Effort(0, 600.0))  # however busy this one is
    choices = {"cache_dir": stages, "log_dir": str(tmp_path / "log"), "shipped_log": False}
    config, quiet = Config(**choices, tune="auto"), Progress(verbosity=-1)
    log = driver.open_log(config, quiet)
    tasks, _ = driver.tasks("synthetic:bert-tiny", log, ROW, config, quiet)
    task = next(t for t in tasks if t.operation == "dense" and not t.shape.get("precision"))
    default = SCHEDULES["dense"].default(task, ROW)
    prior = next(
        {**default, "chunk": chunk}
        for chunk in SCHEDULES["dense"].space(task, ROW)["chunk"]
        if chunk != default["chunk"]
    )
    log.append(dataclasses.replace(record(task, **prior), machine={"cpu": "another processor"}))

    def compiled(progress: Progress) -> str:
        driver.compile("synthetic:bert-tiny", tmp_path / "out", config, progress)
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        kernels = [Task(k["operation"], k["shape"]) for k in manifest["kernels"]]
        return manifest["kernels"][kernels.index(task)]["provenance"]

    def names(progress: Progress) -> list[str]:
        return [stage["stage"] for stage in progress.summary()]

    first, again = Progress(verbosity=-1), Progress(verbosity=-1)
    assert compiled(first) == TUNED and "tune" in names(first)
    row = rows.resolve("native")
    measured_here = driver.open_log(config, quiet).tuned(task, row)
    assert [dict(entry.knobs) for entry in measured_here] == [prior, default]
    assert compiled(again) == TUNED and "tune" not in names(again)


def test_gpu_is_tuned_without_a_reference(tmp_path):
    """Its schedules have no product without a precision."""
    row = rows.resolve("cuda-sm90")
    task = Task("layer_norm", {"channels": 64, "epsilon": 1e-12, "precision": "fp32"})
    runner = Pretended({})
    runner.run = lambda task, knobs, blocks, also=(): {"microseconds": [5.0], "also": {}}
    log = TuningLog([tmp_path], pytest.fail, HERE)
    config = Config(tune="quick", target=row.name, trials=1)
    tasks = Counter({task: 1})
    tuner.tune(tasks, log, row, config, Progress(verbosity=-1), {}, lambda *_: runner)
    assert {entry.reference for entry in log.records(task, row)} == {None}
