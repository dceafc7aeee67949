"""The log: what is written can be read by anybody, whatever happens to a writer."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bertile.base.errors import BertileError
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import SURE, Record, TuningLog

ROW = resolve("x86-avx512", threads=2)
TASK = Task("dense", {"inputs": 64, "outputs": 32, "activation": "none", "residual": False})


DEFAULT = SCHEDULES["dense"].default(TASK, ROW)


def record(microseconds: float = 5.0, threads: int = 2, **knobs: int) -> Record:
    return Record(
        operation=TASK.operation,
        shape=dict(TASK.shape),
        target=ROW.log,
        threads=threads,
        tokens=128,
        knobs={**DEFAULT, **knobs},
        microseconds=(microseconds, microseconds + 1, microseconds + 2),
        machine={"cpu": "test", "cores": 2},
        versions={"apache-tvm": "0"},
        time="2026-01-01T00:00:00+00:00",
    )


def open_log(directory: Path, said: list[str] | None = None) -> TuningLog:
    return TuningLog([directory], (said if said is not None else []).append)


def test_record_comes_back_from_its_line():
    for written in (record(), replace(record(), turn="1f", reference=3.0)):
        assert Record.from_line(written.to_line()) == written


def test_append_is_found_by_a_new_log(tmp_path):
    open_log(tmp_path).append(record(unroll=2))
    best = open_log(tmp_path).best(TASK, ROW)
    assert best.knobs["unroll"] == 2 and best.median == 6.0


@pytest.mark.parametrize(("times", "sure"), [(SURE + 0.01, True), (SURE - 0.01, False)])
def test_estimated_gain_must_be_larger_than_the_estimate_s_error(tmp_path, times, sure):
    """Else it is the default's record; a measured one is believed."""
    log, default = open_log(tmp_path), SCHEDULES["dense"].default(TASK, ROW)
    guess = replace(record(chunk=4), estimated=True, microseconds=(100.0,))
    log.append(guess)
    log.append(replace(guess, knobs=default, microseconds=(100 * times,)))
    assert log.best(TASK, ROW).knobs["chunk"] == (4 if sure else default["chunk"])
    log.append(replace(guess, estimated=False, microseconds=(100 * times,)))
    assert not log.best(TASK, ROW).estimated


def test_estimate_of_a_task_that_no_schedule_knows_is_kept(tmp_path):
    """Of another version: it has no default, and does no harm."""
    log = open_log(tmp_path)
    for changes in ({"operation": "convolution"}, {"shape": {"inputs": 3}}):
        estimate = replace(record(), estimated=True, **changes)
        log.append(estimate)
        assert log.best(estimate.task, ROW) == estimate
    assert log.digest(ROW)


def test_best_is_the_fastest_of_the_same_threads(tmp_path):
    log = open_log(tmp_path)
    for trial in (record(9.0, unroll=1), record(3.0, unroll=2), record(1.0, threads=1, unroll=4)):
        log.append(trial)
    assert log.best(TASK, ROW).knobs["unroll"] == 2


def test_best_takes_another_number_of_threads_before_nothing(tmp_path):
    log = open_log(tmp_path)
    log.append(record(threads=1, unroll=4))
    assert log.best(TASK, ROW).knobs["unroll"] == 4


def test_failed_trial_is_never_the_best(tmp_path):
    log = open_log(tmp_path)
    log.append(replace(record(), microseconds=(), error="wrong result"))
    assert log.best(TASK, ROW) is None and len(log.records(TASK, ROW)) == 1


def test_damaged_lines_are_reported_and_the_rest_is_used(tmp_path):
    log = open_log(tmp_path)
    log.append(record(7.0))
    path = tmp_path / ROW.log / "dense.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"schema": 1, "operation": "den')  # a writer was killed here
    open_log(tmp_path).append(record(2.0, unroll=2))
    with open(path, "ab") as file:
        file.write(b'\xff\xfe nonsense\n{"schema": 99}\n')
    said: list[str] = []
    assert len(open_log(tmp_path, said).records(TASK, ROW)) == 2
    assert len(said) == 1 and "line 2, 4, 5" in said[0] and str(path) in said[0]


def test_digest_changes_with_what_would_be_chosen_alone(tmp_path):
    log = open_log(tmp_path)
    log.append(record(5.0, unroll=1))
    before = log.digest(ROW)
    log.append(record(9.0, unroll=2))
    assert log.digest(ROW) == before
    log.append(record(1.0, unroll=4))
    assert log.digest(ROW) != before


def test_digest_changes_with_the_best_time(tmp_path):
    """Times decide which of two kernels a layer gets."""
    log = open_log(tmp_path)
    log.append(record(5.0, unroll=1))
    before = log.digest(ROW)
    log.append(record(4.0, unroll=1))
    assert log.digest(ROW) != before


def test_times_are_medians_by_number_of_tokens():
    measured = dataclasses.replace(record(5.0), tokens=128, also={"16": (3.0, 1.0, 2.0)})
    assert measured.times == {128: 6.0, 16: 2.0} and measured.median == pytest.approx(12**0.5)
    assert dataclasses.replace(measured, microseconds=()).times == {}


def test_shares_are_those_of_what_was_measured_in_turns(tmp_path):
    """Medians of turns in which the best of both were measured; no matter what times say."""
    log, other = open_log(tmp_path), Task("dense", {**TASK.shape, "precision": "int8"})

    def take(microseconds, task=TASK, turn=None, **knobs):
        also = {"16": (microseconds / 10,)}
        times = {"microseconds": (microseconds,), "also": also}
        log.append(replace(record(**knobs), shape=dict(task.shape), turn=turn, **times))

    take(5.0), take(1.0, other)
    assert log.shares(TASK, other, ROW) == {} and log.digest(ROW) == open_log(tmp_path).digest(ROW)
    before = log.digest(ROW)
    for turn, mine, theirs in (("a", 10, 20), ("b", 30, 50), ("c", 8, 80)):
        take(mine, turn=turn), take(theirs, other, turn)
    take(9.0, turn="d"), take(0.5, other)
    take(9.0, turn="e", chunk=8), take(1.0, other, "e")
    for again in (log, open_log(tmp_path)):
        assert again.shares(TASK, other, ROW) == pytest.approx({16: 0.5, 128: 0.5})
        assert again.shares(other, TASK, ROW) == pytest.approx({16: 2.0, 128: 2.0})
    assert log.digest(ROW) != before
    take(0.1, chunk=8)  # other knobs are the best now
    assert log.shares(TASK, other, ROW) == {128: 9.0, 16: 9.0}


def test_the_winner_of_the_last_contest_is_the_best(tmp_path):
    """Whatever times say; of complete turns alone, and a contest without one does not count."""
    log = open_log(tmp_path)

    def take(microseconds, chunk, turn=None, minute=0):
        changed = {"microseconds": (microseconds,), "time": f"2026-01-01T00:{minute:02}:00+00:00"}
        log.append(replace(record(chunk=chunk), turn=turn, **changed))

    take(1.0, 32)
    take(2.0, 4)
    assert log.best(TASK, ROW).knobs["chunk"] == 32
    for number, (ours, theirs) in enumerate(((10, 12), (50, 90), (8, 7))):
        take(ours, 4, f"a.{number}", 1), take(theirs, 8, f"a.{number}", 1)
    take(0.5, 8, "a.3", 1)  # its time was up
    for again in (log, open_log(tmp_path)):
        assert again.best(TASK, ROW).knobs["chunk"] == 4
        assert again.best(TASK, ROW).median == 10
    take(0.1, 32, "b.0", 2), take(9.0, 8, "b.1", 2)
    assert log.best(TASK, ROW).knobs["chunk"] == 4
    take(9.0, 4, "c.0", 3), take(8.0, 8, "c.0", 3)
    assert log.best(TASK, ROW).knobs["chunk"] == 8


def test_unwritable_directory_is_one_sentence(tmp_path):
    (tmp_path / ROW.log).write_text("a file where the directory should be")
    with pytest.raises(BertileError, match="cannot be written"):
        open_log(tmp_path).append(record())


def _write_forever(directory: str, writer: int) -> None:
    log = TuningLog([Path(directory)], lambda text: None)
    for number in range(10**9):
        log.append(record(float(number + 1), writer=writer, number=number))


def test_two_writers_and_kill_9_lose_and_mix_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_forever, args=(str(tmp_path), i)) for i in (0, 1)]
    path = tmp_path / ROW.log / "dense.jsonl"
    for writer in writers:
        writer.start()
    _wait(lambda: _writers(path) == {0, 1} and path.stat().st_size > 50_000)
    os.kill(writers[0].pid, signal.SIGKILL)
    killed_at = len(path.read_bytes())
    _wait(lambda: len(path.read_bytes()) > killed_at + 20_000)  # the other one goes on
    os.kill(writers[1].pid, signal.SIGKILL)
    for writer in writers:
        writer.join()
    said: list[str] = []
    records = open_log(tmp_path, said).all_records(ROW.log)
    lines = path.read_bytes().count(b"\n")
    torn = lines + (not path.read_bytes().endswith(b"\n")) - len(records)
    assert torn <= 2  # at most the line that each was killed in
    for writer in (0, 1):
        numbers = [r.knobs["number"] for r in records if r.knobs["writer"] == writer]
        assert numbers == list(range(len(numbers)))  # none lost, none twice, in order


def _writers(path: Path) -> set[int]:
    if not path.exists():
        return set()
    lines = path.read_text().splitlines()[:-1]
    return {json.loads(line)["knobs"]["writer"] for line in lines}


def _wait(done, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "the writers did not get far enough"
        time.sleep(0.02)


def test_shipped_log_is_left_out_where_it_is_not_wanted(tmp_path):
    with_shipped = TuningLog.open(str(tmp_path))
    alone = TuningLog.open(str(tmp_path), shipped=False)
    assert with_shipped.tasks(ROW) and not alone.tasks(ROW)
    assert with_shipped.directories[-1] == tmp_path.resolve()
    assert alone.directories == [tmp_path.resolve()]


def test_records_of_another_row_s_kernel_are_not_this_row_s(tmp_path):
    """Rows with and without tiles share a log: of floats their kernels are the same."""
    task = Task("dense", {**TASK.shape, "precision": "int8"})
    log, rows = open_log(tmp_path), [resolve(name, 2) for name in ("x86-amx", "x86-avx512-vnni")]
    for row in rows:
        knobs = SCHEDULES["dense"].default(task, row)
        log.append(replace(record(), shape=dict(task.shape), knobs=knobs))
    for row in rows:
        (mine,) = log.records(task, row)
        assert dict(mine.knobs) == SCHEDULES["dense"].default(task, row)
        assert log.best(task, row) == mine
    log.append(record())
    assert len(log.records(TASK, rows[0])) == len(log.records(TASK, rows[1])) == 1


def test_records_that_lack_a_later_knob_have_what_kernels_did_before(tmp_path):
    shape = {"heads": 2, "head_size": 32, "scale": 32**-0.5, "bias": False}
    task, schedule = Task("attention", shape), SCHEDULES["attention"]
    knobs = schedule.default(task, ROW)
    old = {name: value for name, value in knobs.items() if name not in schedule.later}
    assert old != knobs
    log = open_log(tmp_path)
    log.append(replace(record(), operation="attention", shape=shape, knobs=old))
    best = open_log(tmp_path).best(task, ROW)
    assert dict(best.knobs) == {**old, **schedule.later}
    assert schedule.valid(task, ROW, best.knobs)


@pytest.mark.parametrize("home, kept", [("{tmp}", "{tmp}"), ("not/absolute", "~/.local/share")])
def test_user_log_lies_where_a_users_programs_keep_their_files(tmp_path: Path, home, kept) -> None:
    code = "from bertile.tune.log.tuning_log import USER_LOG; print(USER_LOG)"
    variables = {**os.environ, "XDG_DATA_HOME": home.format(tmp=tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True)
    assert said.strip() == f"{kept.format(tmp=tmp_path)}/bertile/tuning_logs"
