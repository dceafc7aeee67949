"""What a person asks of a tuning log, and the way of other logs' records into one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.cli import main
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task
from bertile.targets.rows import TABLE, native
from bertile.tune.log import log_commands
from bertile.tune.log.tuning_log import Record, TuningLog

DENSE = Task("dense", {"inputs": 64, "outputs": 32, "activation": "gelu", "residual": False})
NORM = Task("layer_norm", {"channels": 64, "epsilon": 1e-12})
SILENT = Progress(-1)


def record(first: float = 5.0, task: Task = DENSE, **changes) -> Record:
    default = Record(
        operation=task.operation,
        shape=dict(task.shape),
        target="x86-avx512",
        threads=2,
        tokens=128,
        knobs={"unroll": 2},
        microseconds=(first, first + 1, first + 2),
        machine={"cpu": "test", "cores": 2},
        versions={"apache-tvm": "0.27.0"},
        time="2026-01-01T00:00:00+00:00",
    )
    return replace(default, **changes)


def open_log(directory: Path) -> TuningLog:
    return TuningLog([directory], lambda text: None)


def filled(directory: Path) -> TuningLog:
    log = open_log(directory)
    log.append(record(9.0, knobs={"unroll": 1}))
    log.append(record(4.0, time="2026-02-01T00:00:00+00:00", versions={"apache-tvm": "0.28.0"}))
    log.append(record(microseconds=(), error="wrong result", knobs={"unroll": 8}))
    log.append(record(2.0, threads=1))
    log.append(record(7.0, NORM))
    log.append(record(3.0, NORM, target="x86-avx2"))
    return open_log(directory)


def test_best_of_estimates_is_what_a_build_takes(tmp_path: Path) -> None:
    """The default, where another choice is estimated to be hardly faster."""
    row, log = replace(native(), threads=2), open_log(tmp_path)
    knobs = SCHEDULES["dense"].default(DENSE, row)
    log.append(record(10.0, estimated=True, target=row.log))
    log.append(record(10.1, estimated=True, target=row.log, knobs=knobs))
    (chosen,) = log_commands.best(open_log(tmp_path))
    assert chosen["knobs"] == knobs == log.best(DENSE, row).knobs and chosen["estimated"]


@pytest.fixture
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's best row is that of AVX2."""
    (row,) = (row for row in TABLE if row.name == "x86-avx2")
    monkeypatch.setattr(log_commands.targets, "native", lambda: row)


def test_this_machine_comes_first(tmp_path: Path, on_avx2, monkeypatch) -> None:
    log = filled(tmp_path)
    log.append(record(1.0, NORM, target="x86-avx2", machine={"cpu": "here"}))
    log.append(record(1.0, NORM, target="arm-v2"))
    monkeypatch.setattr(log_commands.machine, "processor", lambda: {"cpu": "here"})
    for rows in (log_commands.tasks(log), log_commands.best(log)):
        places = [(row["target"], row["processor"]) for row in rows]
        assert places[:2] == [("x86-avx2", "here"), ("x86-avx2", "test")]
        assert {target for target, _ in places[2:]} == {"arm-v2", "x86-avx512"}


def test_list_and_best_agree(tmp_path: Path, on_avx2) -> None:
    """By what was measured, not by the least median alone, whatever the reference took."""
    log = filled(tmp_path)
    log.append(record(3.0, knobs={"unroll": 4}, reference=100.0))
    log.append(record(3.5, knobs={"unroll": 5}, reference=30.0))
    log.append(record(1.0, knobs={"unroll": 6}, estimated=True))
    chosen = {(r["operation"], r["target"], r["threads"]): r for r in log_commands.best(log)}
    listed = log_commands.tasks(log)
    assert [(row["operation"], row["threads"]) for row in listed] == [
        (operation, threads) for operation, _, threads in chosen
    ]
    for row in listed:
        assert row["best_us"] == chosen[row["operation"], row["target"], row["threads"]]["best_us"]
    assert chosen["dense", "x86-avx512", 2]["knobs"] == {"unroll": 4}


def test_list_has_a_row_per_task_and_threads(tmp_path: Path, on_avx2) -> None:
    rows = log_commands.tasks(filled(tmp_path))
    names = [(row["target"], row["operation"], row["threads"]) for row in rows]
    assert names == [
        ("x86-avx2", "layer_norm", 2),
        ("x86-avx512", "dense", 1),
        ("x86-avx512", "dense", 2),
        ("x86-avx512", "layer_norm", 2),
    ]
    dense = rows[2]
    assert (dense["trials"], dense["failed"], dense["best_us"]) == (3, 1, 5.0)
    assert dense["when"].startswith("2026-02-01") and dense["tvm"] == "0.27.0, 0.28.0"
    assert "activation=gelu inputs=64 outputs=32" in log_commands.as_text(rows)


def test_target_is_a_row_and_stands_for_its_log(tmp_path: Path) -> None:
    log = filled(tmp_path)
    assert [row["target"] for row in log_commands.tasks(log, "x86-avx2")] == ["x86-avx2"]
    assert len(log_commands.tasks(log, "x86-avx512-bf16")) == 3
    with pytest.raises(UsageError, match="did you mean 'x86-avx512'"):
        log_commands.tasks(log, "x86-avx521")


def test_best_has_the_knobs_of_the_fastest_and_leaves_failures_out(tmp_path: Path) -> None:
    log = filled(tmp_path)
    log.append(record(microseconds=(), task=Task("attention", {"heads": 2}), error="crashed"))
    rows = log_commands.best(log, "x86-avx512")
    assert [(row["operation"], row["threads"], row["best_us"]) for row in rows] == [
        ("dense", 1, 3.0),
        ("dense", 2, 5.0),
        ("layer_norm", 2, 8.0),
    ]
    assert rows[1]["knobs"] == {"unroll": 2} and "unroll=2" in log_commands.as_text(rows)
    (hopeless, *_) = log_commands.tasks(log, "x86-avx512")
    assert hopeless["operation"] == "attention" and hopeless["best_us"] is None


def test_merge_adds_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    filled(tmp_path / "theirs")
    ours = open_log(tmp_path / "ours")
    ours.append(record(9.0, knobs={"unroll": 1}))
    done = log_commands.merge(ours, [tmp_path / "theirs"], SILENT)
    assert (done["added"], done["known"], done["bad"]) == (5, 1, 0)
    again = log_commands.merge(open_log(tmp_path / "ours"), [tmp_path / "theirs"], SILENT)
    assert (again["added"], again["known"]) == (0, 6)
    merged, theirs = open_log(tmp_path / "ours"), open_log(tmp_path / "theirs")
    for target in ("x86-avx512", "x86-avx2"):
        lines = sorted(record.to_line() for record in merged.all_records(target))
        assert lines == sorted(record.to_line() for record in theirs.all_records(target))


def test_merge_of_one_file_twice_in_a_command_adds_it_once(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(record().to_line() * 2)
    done = log_commands.merge(open_log(tmp_path / "ours"), [file, file], SILENT)
    assert (done["added"], done["known"]) == (1, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "../../elsewhere"},
        {"operation": "a/b"},
        {"microseconds": (-1.0,)},
        {"microseconds": (float("nan"),)},
        {"microseconds": ("fast",)},
        {"threads": 0},
        {"knobs": {"unroll": "two"}},
        {"knobs": ["unroll"]},
        {"versions": None},
        {"time": 5},
    ],
)
def test_merge_reports_a_line_that_must_not_enter_the_log(
    tmp_path: Path, changes: dict, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(record(**changes).to_line() + "{half a li\n" + record().to_line())
    done = log_commands.merge(open_log(tmp_path / "ours"), [file], Progress(0))
    assert (done["added"], done["bad"]) == (1, 2)
    assert f"{file}: line 1, 2 is not a tuning record" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "records.jsonl"]


def test_merge_without_records_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no log"):
        log_commands.merge(open_log(tmp_path), [tmp_path / "nowhere"], SILENT)
    with pytest.raises(UsageError, match=r"has no \.jsonl file"):
        log_commands.merge(open_log(tmp_path), [tmp_path], SILENT)


def test_commands_print_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    filled(tmp_path / "theirs")
    own = ["--log-dir", str(tmp_path / "ours"), "-q"]
    assert main.main(["tune", "--merge", str(tmp_path / "theirs"), *own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 6
    assert main.main(["tune", "--list", "--target", "x86-avx2", *own]) == 0
    out = capsys.readouterr().out
    assert "layer_norm" in out and "channels=64" in out
    assert main.main(["tune", "--best", *own, "--target", "x86-avx2", "--json"]) == 0
    (row,) = [r for r in json.loads(capsys.readouterr().out) if r["shape"] == dict(NORM.shape)]
    assert row["knobs"] == {"unroll": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no MODEL to tune was named"),
        (["minilm", "--list"], "unexpected argument 'minilm'"),
        (["--list", "--best"], "not allowed with"),
        (["--merge", "/no/log"], "there is no log '/no/log'"),
    ],
)
def test_usage_mistakes_are_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main.main(["tune", *arguments, "--log-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
