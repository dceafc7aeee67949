"""Engines as servers: turns, loads, twins, streams, ratios, what waiting costs."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bertile.base.errors import UsageError
from bertile.bench import busy_cores, pages, serving, serving_tables, workloads
from bertile.bench.engines import Engine, Source
from bertile.bench.serving import IDLE, LOADS, Service
from bertile.bench.traffic import Served, Traffic
from bertile.cli import main
from bertile.config import Config
from bertile.onnx.exported import ExportedModel

MANIFEST: dict[str, Any] = {
    "model": {"source": "minilm", "max_length": 512},
    "static": {"length": None},
    "inputs": [{"name": "input_ids", "dtype": "int64", "below": 10, "default": None}],
}
MILLISECONDS = {"bertile": 2.0, "onnxruntime": 4.0, "deepsparse": 1.0}


class Worker:
    """Stands in for an engine's process: every call takes its milliseconds, nothing is waited."""

    alive: ClassVar[list[Worker]] = []
    asked: ClassVar[list[tuple[Worker, Traffic, int]]] = []
    pid = 0

    def __init__(self, engine: Engine, threads: int, cache_dir: str | None) -> None:
        self.engine, self.name, self.clock = engine, engine.name, 0.0
        self.alive.append(self)

    def receive(self) -> Any:
        return self.answer if hasattr(self, "answer") else self.name.title()

    def outputs(self, inputs: dict) -> list[np.ndarray]:
        return [np.ones((1, 2), np.float32)]

    def begin_drive(self, requests: list, traffic: Traffic) -> None:
        Worker.asked.append((self, traffic, len(Worker.alive)))
        ms = MILLISECONDS[self.name]
        count = traffic.count or int(traffic.seconds * 1e3 / ms) * traffic.callers
        seconds = count * ms / 1e3 / traffic.callers
        self.answer = Served([ms] * count, seconds, seconds)

    def drive(self, requests: list, traffic: Traffic) -> Served:
        self.begin_drive(requests, traffic)
        return self.receive()

    def cpu_seconds(self) -> float:
        self.clock += 0.5 if self.name == "onnxruntime" else 0.0
        return self.clock

    def close(self) -> None:
        Worker.alive.remove(self)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Worker, Traffic, int]]:
    """What workers were asked to do: the worker, the traffic, how many workers there were."""
    Worker.alive, Worker.asked = [], []
    source = Source(Path("out"), Path("model.onnx"))
    engines = [Engine(name, name, "fp32", source) for name in MILLISECONDS]
    monkeypatch.setattr("bertile.bench.turns.start", Worker)
    monkeypatch.setattr("bertile.bench.turns.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(serving, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(serving, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(serving.loader, "read_manifest", lambda directory: MANIFEST)
    monkeypatch.setattr(serving.competitors, "engines", lambda *arguments: (engines, ["a note"]))
    return Worker.asked


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cores were asked to be busy, load by load; none is."""
    counts: list[int] = []

    @contextlib.contextmanager
    def count(numbers: list[int]) -> Iterator[list[int]]:
        counts.append(len(numbers))
        yield []

    monkeypatch.setattr(busy_cores, "busy", count)
    monkeypatch.setattr(busy_cores, "cores", lambda: [0, 1, 4, 5])
    return counts


def bench(service: Service, **choices: Any) -> dict[str, Any]:
    return serving.bench(Path("out"), service=service, threads=2, **choices)


def test_report_has_rates_percentiles_and_ratios(asked: list) -> None:
    report = bench(Service(lengths=[16], repeat=12))
    ours, theirs = report["rows"]
    assert (ours["calls"], ours["p99_ms"], ours["beside"]) == (12, 2.0, "nothing")
    assert ours["calls_per_s"] == pytest.approx(500) and ours["cores"] == pytest.approx(1)
    assert ours["tokens_per_s"] == pytest.approx(8000)
    assert theirs["p50_ms_ratio"] == 0.5 and theirs["calls_per_s_ratio"] == pytest.approx(2)
    assert report["notes"] == [
        "a note",
        "deepsparse is left out: it takes requests of one size, from one caller",
    ]


def test_engines_take_turns_and_requests_go_on(asked: list) -> None:
    bench(Service(lengths=[16], repeat=12))
    named = [(worker.name, traffic.count, traffic.first) for worker, traffic, _ in asked]
    assert named[1::2][:2] == [("bertile", 5, 0), ("onnxruntime", 5, 0)]  # behind a warm-up each
    assert named[4:] == [
        *(("onnxruntime", 5, 5), ("bertile", 5, 5)),
        *(("bertile", 2, 10), ("onnxruntime", 2, 10)),
    ]


def test_seconds_are_cut_into_turns(asked: list) -> None:
    report = bench(Service(lengths=[16], seconds=2.5, callers=3, rate=7.0))
    plans = [
        traffic for worker, traffic, _ in asked if traffic.seconds and worker.name == "bertile"
    ]
    assert [plan.seconds for plan in plans] == [pytest.approx(2.5 / 3)] * 3
    assert {(plan.callers, plan.rate) for plan in plans} == {(3, 7.0)}
    assert report["rows"][0]["callers"] == 3 and "7 requests a second" in table([report])


def test_streams_are_compared_with_as_many_callers(asked: list) -> None:
    report = bench(Service(lengths=[16, 32], streams=[2, 1]))
    shapes = [
        (row["length"], row["engine"], row["streams"], row["callers"]) for row in report["rows"]
    ]
    assert shapes[:4] == [
        *((16, "bertile", 2, 2), (16, "onnxruntime", 2, 2)),
        *((16, "bertile", 1, 1), (16, "onnxruntime", 1, 1)),
    ]
    assert serving_tables.place_of([report]) == "bench-streams"
    with pytest.raises(UsageError, match="3 streams are more than the 2 threads"):
        bench(Service(streams=[3]))


def test_loads_are_what_they_say_and_a_twin_doubles_the_calls(asked: list, busy: list) -> None:
    report = bench(Service(lengths=[32], repeat=5, loads=LOADS))
    assert busy == [0, 1, 4, 0]
    ours = [row for row in report["rows"] if row["engine"] == "bertile"]
    assert [row["beside"] for row in ours] == [load.name for load in LOADS]
    assert [row["calls"] for row in ours] == [5, 5, 5, 10]
    assert ours[3]["calls_per_s"] == pytest.approx(1000)
    assert max(alive for _, _, alive in asked) == 4 and Worker.alive == []
    assert serving_tables.place_of([report]) == "bench-load"


def test_length_that_nobody_says_is_the_usual_one_or_what_the_model_takes(
    asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(Service(repeat=1))["rows"][0]["length"] == 128
    short = {**MANIFEST, "model": {**MANIFEST["model"], "max_length": 20}}
    monkeypatch.setattr(serving.loader, "read_manifest", lambda directory: short)
    assert bench(Service(repeat=1))["rows"][0]["length"] == 20
    assert bench(Service(repeat=1, usual=16))["rows"][0]["length"] == 16


def test_waiting_engines_tell_what_they_burn(asked: list) -> None:
    ours, theirs = bench(Service(lengths=[16], repeat=1))["waiting"]
    assert ours["cpu_per_s"] == 0 and theirs["cpu_per_s"] > 1


def test_rate_without_a_request_is_told(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MILLISECONDS, "bertile", 1e9)
    with pytest.raises(UsageError, match=r"no request fell due at a rate of 0\.01"):
        bench(Service(lengths=[16], seconds=1.0, rate=0.01))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"seconds": 0.0}, "seconds is 0"),
        ({"callers": -1}, "callers is -1"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"streams": [0]}, "streams is 0"),
        ({"mix": workloads.parse_mix("8"), "source": Path("x.txt")}, "leave out --lengths"),
    ],
)
def test_bad_choices_are_refused(choice: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Service(**choice)


def table(reports: list[dict]) -> str:
    return serving_tables.as_table(reports, markdown=True)


def test_tables_are_markdown_or_csv(asked: list, tmp_path: Path) -> None:
    report = bench(Service(lengths=[16], repeat=2))
    text = table([report])
    assert text.count("| model") == 2 and "| p99 vs engine |" in text and "2 calls of each" in text
    assert serving_tables.place_of([report]) == "bench-traffic"
    rows = list(csv.DictReader(serving_tables.as_csv([report]).splitlines()))
    assert len(rows) == 2 and float(rows[1]["p50_ms_ratio"]) == 0.5
    page = tmp_path / "RESULTS.md"
    page.write_text("<!-- bench-load -->\n<!-- /bench-load -->\n")
    pages.write_table(str(page), "bench-load", text, "bertile bench --load")
    assert "| p99 vs engine |" in page.read_text()


def ask(monkeypatch: pytest.MonkeyPatch, *words: str) -> Service:
    """What the command line makes of its flags."""
    asked: dict[str, Any] = {}

    def run(*arguments: Any, **choices: Any) -> list[dict]:
        asked.update(choices)
        return [{}]

    monkeypatch.setattr("bertile.bench.benchmark.bench_models", run)
    monkeypatch.setattr(serving_tables, "as_table", lambda reports, markdown: "a table")
    assert main.main(["bench", "out", "-q", *words]) == 0
    assert asked["measure"] is serving.bench
    return asked["service"]


def test_flags_of_the_command_line_make_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    service = ask(monkeypatch, "--load")
    assert (service.lengths, service.usual, service.seconds, service.loads) == ((), 32, 5.0, LOADS)
    line = "--streams 1,2 --concurrency 2 --rate 50 --duration 0.5 --lengths 8-16 --batch 4"
    service = ask(monkeypatch, *line.split())
    assert service.streams == [1, 2] and service.callers == 2 and service.batches == [4]
    assert (service.rate, service.seconds, service.mix.text) == (50.0, 0.5, "8-16")
    assert service.loads == (IDLE,)
    assert ask(monkeypatch, "--input", "a.txt").source == Path("a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lengths 8-16 --length 8", "exclude each other"),
        ("--load --startup", "--startup is another measurement"),
        ("--duration 0", "seconds is 0"),
        ("--lengths 8-x", "--lengths has '8-x'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    line: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main.main(["bench", "out", "-q", *line.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_real_engines_answer_beside_every_load(
    exported: ExportedModel, stages: str, tmp_path: Path
) -> None:
    """A bundle and ONNX Runtime with two streams, a mix of lengths and every load, for moments."""
    from bertile import driver

    config = Config(threads=2, cache_dir=stages)
    driver.compile(exported.source, tmp_path / "out", config)
    service = Service(
        batches=[2],
        mix=workloads.parse_mix("8-32"),
        streams=[1, 2] if len(busy_cores.cores()) > 1 else [1],
        callers=2,
        rate=100.0,
        seconds=0.3,
        loads=LOADS,
    )
    report = serving.bench(
        tmp_path / "out", service=service, threads=max(service.streams), cache_dir=stages
    )
    engines = 2 * len(service.streams)
    assert len(report["rows"]) == 4 * engines and len(report["waiting"]) == engines
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["calls"] > 0 for row in report["rows"])
    assert all(row["cosine"] == pytest.approx(1, abs=1e-4) for row in report["rows"])
    ours = [row["cpu_per_s"] for row in report["waiting"] if row["engine"] == "bertile"]
    assert max(ours) < 0.05  # a model that waits burns no processor time
