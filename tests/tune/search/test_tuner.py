"""Tuning: trials are real measurements, failures cost themselves alone, a second run resumes."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import geometric_mean, median
from types import SimpleNamespace

import pytest

from bertile.base.progress import Progress
from bertile.config import Config
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import native
from bertile.tune.log.tuning_log import Record, TuningLog, fair_time, last_contest
from bertile.tune.measure.trial_runner import TrialRunner
from bertile.tune.search import tuner

ROW = native()
SMALL = Task("dense", {"inputs": 32, "outputs": 24, "activation": "gelu", "residual": False})
NORM = Task("layer_norm", {"channels": 32, "epsilon": 1e-12})
QUIET = Progress(verbosity=-1)
TRIALS = 12  # more than the defaults and a round: the cost model has been trained

pytestmark = pytest.mark.usefixtures("no_slow_spells")


def open_log(directory: Path) -> TuningLog:
    return TuningLog([directory], lambda text: None)


def run(tasks: Counter, directory: Path, *more, **config) -> dict:
    return tuner.tune(tasks, open_log(directory), ROW, Config(tune="quick", **config), QUIET, *more)


@pytest.fixture(scope="module")
def trials():
    """A runner for all tests, since its process takes long to start."""
    with TrialRunner(ROW) as trials:
        yield trials


@pytest.fixture(scope="module")
def run_shared(trials):
    """As ``run``, by the shared runner."""

    def tune(tasks: Counter, directory: Path, others: dict | None = None, **config) -> dict:
        return run(tasks, directory, others or {}, lambda *_: nullcontext(trials), **config)

    return tune


@pytest.fixture(scope="module")
def tuned(run_shared, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("log")
    return directory, run_shared(Counter({SMALL: 2, NORM: 1}), directory, trials=TRIALS)


def test_search_measures_distinct_points_of_the_space(tuned):
    directory, result = tuned
    every = open_log(directory).records(SMALL, ROW)
    records = [record for record in every if record.turn is None]
    space = SCHEDULES["dense"].space(SMALL, ROW)
    points = [tuple(sorted(r.knobs.items())) for r in records]
    assert len(points) == len(set(points)) >= 10
    assert all(r.knobs[k] in space[k] for r in records for k in space)
    assert result["trials"] == len(every) + len(open_log(directory).records(NORM, ROW))


def test_a_search_ends_with_a_contest_of_the_best(tuned):
    """The default's knobs, and the three that took least in the search, in every turn."""
    log = open_log(tuned[0])
    contest = last_contest(log.records(SMALL, ROW))
    assert len(contest) == tuner.TURNS
    knobs = [sorted(str(record.knobs) for record in turn) for turn in contest]
    assert knobs[0] == knobs[1] and 3 <= len(knobs[0]) <= tuner.FINALISTS + 1
    assert SCHEDULES["dense"].default(SMALL, ROW) in [dict(r.knobs) for r in contest[0]]
    assert log.best(SMALL, ROW) in [record for turn in contest for record in turn]


def test_default_is_among_the_trials_and_the_best_is_no_slower(tuned):
    records = open_log(tuned[0]).records(SMALL, ROW)
    default = SCHEDULES["dense"].default(SMALL, ROW)
    assert sum(dict(r.knobs) == default and r.turn is None for r in records) == 1
    best = open_log(tuned[0]).best(SMALL, ROW)

    def standing(knobs):
        """Its median share of the turns' geometric means."""
        shares = []
        for turn in last_contest(records):
            times = {frozenset(r.knobs.items()): fair_time(r, ROW) for r in turn}
            shares.append(times[frozenset(knobs.items())] / geometric_mean(times.values()))
        return median(shares)

    assert best.turn and standing(best.knobs) <= standing(default)


def test_record_says_what_a_reader_needs(tuned):
    record = open_log(tuned[0]).best(SMALL, ROW)
    assert record.task == SMALL and record.target == ROW.log and record.tokens == 128
    assert len(record.microseconds) == 3 and all(us > 0 for us in record.microseconds)
    assert record.machine["cores"] >= 1 and record.versions["apache-tvm"]


def test_second_run_resumes_and_repeats_nothing(tuned):
    before = len(open_log(tuned[0]).records(NORM, ROW))
    assert run(Counter({NORM: 1}), tuned[0], trials=TRIALS)["trials"] == 0
    assert len(open_log(tuned[0]).records(NORM, ROW)) == before


def test_what_a_layer_could_have_instead_is_measured_once(run_shared, tmp_path):
    """Its default, so that the choice between the two need not be estimated again."""
    sparse = Task("sparse", {**SMALL.shape, "density": 10})
    for trials in (1, 0):
        assert run_shared(Counter(), tmp_path, {sparse: None})["trials"] == trials
    (record,) = open_log(tmp_path).records(sparse, ROW)
    assert record.knobs == SCHEDULES["sparse"].default(sparse, ROW) and record.microseconds


@pytest.mark.parametrize(("slower", "searched"), [(1.4, True), (1.6, False)])
def test_what_a_layer_could_have_instead_is_searched_where_it_comes_near(
    tmp_path, monkeypatch, slower, searched
):
    """A kernel whose default alone was measured has not lost against one that was searched."""
    log = open_log(tmp_path)
    other = Task("dense", {**SMALL.shape, "precision": "int8"})
    for task, us in ((SMALL, 100.0), (other, slower * 100)):
        default = SCHEDULES["dense"].default(task, ROW)
        log.append(
            Record(
                operation="dense",
                shape=dict(task.shape),
                target=ROW.log,
                threads=ROW.threads,
                tokens=128,
                knobs=default,
                microseconds=(us,),
                machine=tuner.machine_facts(ROW),
                versions={},
                time="",
            )
        )
    asked = []
    monkeypatch.setattr(
        "bertile.tune.search.search.search", lambda spaces, *_: asked.extend(spaces)
    )
    config = Config(tune="quick", trials=2)
    tuner.tune(
        Counter({SMALL: 3}),
        log,
        ROW,
        config,
        QUIET,
        {other: SMALL},
        lambda *_: nullcontext(SimpleNamespace(parallel=2)),
    )
    assert [(task, weight) for task, _, weight in asked] == [
        (SMALL, 3.0),
        *([(other, 3.0)] if searched else []),
    ]


def test_kernels_of_a_layer_that_are_about_as_fast_are_measured_in_turns(tmp_path):
    """Once, whatever the search had time for; those that are far apart are not."""

    class Trials:
        parallel = 1

        def __init__(self):
            self.order = []

        def run(self, task, knobs, blocks, also=()):
            self.order.append(task)
            slow = 300.0 if task == far else 100.0 + len(self.order)
            return {"microseconds": [slow]}

    near, far = (Task("sparse", {**SMALL.shape, "density": percent}) for percent in (10, 50))
    arguments = Counter({SMALL: 1}), open_log(tmp_path), ROW, Config(tune="quick", trials=1)
    others = {near: SMALL, far: SMALL}
    for turns in (tuner.TURNS, 0):
        trials = Trials()
        result = tuner.tune(*arguments, QUIET, others, lambda *_, t=trials: nullcontext(t))
        assert trials.order[len(trials.order) - 2 * turns :] == [SMALL, near] * turns
        assert f"{2 * turns} of them in turns" in result["text"] or not turns
        assert all(r.turn is None for r in open_log(tmp_path).records(far, ROW))
    assert result["trials"] == 0
    log = open_log(tmp_path)
    assert len(log.turns(SMALL, ROW)) == len(log.turns(near, ROW)) == tuner.TURNS
    assert log.shares(near, SMALL, ROW)


def test_sparse_kernel_without_zeros_to_skip_is_not_tuned(run_shared, tmp_path):
    full, tenth = (Task("sparse", {**SMALL.shape, "density": percent}) for percent in (100, 10))
    run_shared(Counter({full: 1, tenth: 1}), tmp_path, trials=2)
    log = open_log(tmp_path)
    assert not log.records(full, ROW) and log.records(tenth, ROW)


def test_timeout_ends_the_search_with_what_was_measured(run_shared, tmp_path):
    result = run_shared(Counter({SMALL: 1}), tmp_path, trials=500, timeout=0.001)
    assert "out of time" in result["text"] and result["trials"] <= 1


def test_ctrl_c_keeps_the_best_so_far_and_says_so(run_shared, tmp_path, monkeypatch):
    real, calls = TrialRunner.run, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 5:  # two of them are the reference's
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(TrialRunner, "run", interrupted)
    result = run_shared(Counter({SMALL: 1}), tmp_path, trials=20)
    assert "Ctrl-C" in result["text"]
    assert len(open_log(tmp_path).records(SMALL, ROW)) == 2


def test_wrong_result_is_an_error_not_a_time(monkeypatch):
    trial = pytest.importorskip("bertile.tune.measure.trial", reason="needs TVM")
    good = SCHEDULES["layer_norm"]
    wrong = Task("layer_norm", {"channels": 32, "epsilon": 0.5})
    knobs = good.default(NORM, ROW)

    def other_epsilon(task, knobs, row):
        return trial.tvm.tirx.build(
            trial.tvm.IRModule(
                {"kernel": good.kernel(wrong, knobs, row).with_attr("global_symbol", "kernel")}
            ),
            target=trial.tvm_target(row),
        )["kernel"]

    arguments = (NORM.operation, dict(NORM.shape), knobs, ROW.name, 1, 2)
    assert "microseconds" in trial.measure(*arguments)
    monkeypatch.setattr(trial, "build", other_epsilon)
    assert "wrong result" in trial.measure(*arguments)["error"]


def test_crash_and_hang_cost_their_own_trial_only(trials, monkeypatch):
    default = SCHEDULES["layer_norm"].default(NORM, ROW)
    assert "microseconds" in trials.run(NORM, default, 2)
    trials._process.kill()  # what a crash of the candidate looks like from here
    assert "error" in trials.run(NORM, default, 2)
    assert "microseconds" in trials.run(NORM, default, 2)
    monkeypatch.setattr(trials, "_timeout", 0.0)  # and a hang
    began = time.monotonic()
    slow = Task("dense", {**SMALL.shape, "inputs": 4096, "outputs": 4096})
    outcome = trials.run(slow, SCHEDULES["dense"].default(slow, ROW), 8)
    assert "no result within" in outcome["error"]
    assert time.monotonic() - began < 5
    monkeypatch.setattr(trials, "_timeout", 60.0)
    assert "microseconds" in trials.run(NORM, default, 2)


def test_bad_candidate_is_answered_with_its_error(trials):
    assert "ZeroDivisionError" in trials.run(NORM, {"sums": 0}, 2)["error"]


def test_full_effort_ends_when_nothing_improves(tmp_path, monkeypatch):
    monkeypatch.setitem(tuner.EFFORTS, "quick", tuner.Effort(2000, 600.0, patience=1))
    monkeypatch.setattr(TrialRunner, "run", lambda *args: {"microseconds": [7.0]})
    result = run(Counter({SMALL: 1}), tmp_path)
    assert "no task improved by 1% in 1 rounds" in result["text"]
    records = open_log(tmp_path).records(SMALL, ROW)
    assert sum(record.turn is None for record in records) == 1 + tuner.ROUND
