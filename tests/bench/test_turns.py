"""Measuring in turns: who is called when, what is compared with what, who is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import MissingExtraError
from bertile.base.progress import Progress
from bertile.bench import turns
from bertile.bench.engines import Engine, LeftOut, Source

NAMES = ("bertile", "absent", "bare", "weak")
INPUTS = {"input_ids": np.ones((1, 16), np.int64)}


class Worker:
    """Stands in for an engine's process: writes down when it is called."""

    def __init__(self, name: str, milliseconds: float = 1.0, calls: list[str] | None = None):
        kind, _, precision = name.partition(":")
        kind = "bertile" if "/" in name else kind
        self.name, self.engine = name, Engine(name, kind, precision or "fp32", Source(Path()))
        self.milliseconds, self.calls = milliseconds, calls if calls is not None else []
        self.closed, self.size = False, 1.0

    def receive(self) -> str:
        if self.name == "absent":
            raise LeftOut("absent is left out: it is not there")
        if self.name == "bare":
            raise MissingExtraError("this step needs the package torchao")
        return self.name.title()

    def call(self, inputs: dict, count: int) -> list[float]:
        self.calls.append(self.name)
        return [self.milliseconds] * count

    def outputs(self, inputs: dict) -> list[np.ndarray]:
        if self.name == "weak":
            raise LeftOut("weak is left out: it cannot run the model")
        return [np.array([[3.0, 0.0], [0.0, self.size]], np.float32)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)


def test_engines_take_turns_and_the_first_of_a_turn_changes() -> None:
    calls: list[str] = []
    ours, theirs = Worker("bertile", 2.0, calls), Worker("onnxruntime", 4.0, calls)
    theirs.size = 3.0
    rows = turns.measure([ours, theirs], INPUTS, 12, Progress(-1))
    forth = ["bertile", "onnxruntime"]
    assert calls == forth + forth[::-1] + forth
    assert [row["median_ms"] for row in rows] == [2.0, 4.0] and rows[0]["p99_ms"] == 2.0
    assert rows[1]["ratio"] == 0.5 and rows[1]["max_abs_difference"] == 2.0


def test_ratio_to_the_best_is_by_the_fastest_other_library() -> None:
    times = {"bertile": 2.0, "a": 3.0, "b": 2.5, "out/x": 1.0, "b:int8": 0.5}
    workers = [Worker(name, milliseconds) for name, milliseconds in times.items()]
    rows = turns.measure(workers, INPUTS, 3, Progress(-1))
    # another build of Bertile is compared, but is no other library, and int8 is no rival of fp32
    assert [row["best_ratio"] for row in rows] == [2.0 / 2.5, None, None, None, None]
    assert [row["ratio"] for row in rows] == [1.0, 2.0 / 3.0, 0.8, 2.0, 4.0]


def test_engine_that_computes_another_model_is_no_rival() -> None:
    workers = [Worker(name, ms) for name, ms in {"bertile": 2.0, "a": 1.0, "b": 4.0}.items()]
    workers[1].size = -1.0
    rows = turns.measure(workers, INPUTS, 3, Progress(-1))
    assert rows[1]["cosine"] == pytest.approx(0) and rows[0]["best_ratio"] == 0.5


def test_cosine_is_to_the_reference_where_there_is_one() -> None:
    reference = [np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)]
    (row,) = turns.measure([Worker("bertile")], INPUTS, 3, Progress(-1), reference)
    assert row["cosine"] == pytest.approx((1 + np.sqrt(0.5)) / 2)
    (row,) = turns.measure([Worker("bertile")], INPUTS, 3, Progress(-1))
    assert row["cosine"] == pytest.approx(1) and row["max_abs_difference"] == 0


def test_engine_that_cannot_start_or_run_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = {name: Worker(name) for name in NAMES}

    def start(engine: Engine, threads: int, cache_dir: str | None) -> Worker:
        if engine.name == "gone":
            raise LeftOut("gone is left out: it cannot be installed")
        return stand_ins[engine.name]

    monkeypatch.setattr(turns, "start", start)
    engines = [Engine(n, n, "fp32", Source(Path())) for n in ("gone", *NAMES)]
    with turns.started(engines, INPUTS, 1, None) as (workers, versions, notes):
        assert [worker.name for worker in workers] == ["bertile"] == list(versions)
        assert [note.split()[0] for note in notes] == ["gone", "absent", "bare", "weak"]
        assert notes[2] == "bare is left out: this step needs the package torchao"
        assert stand_ins["weak"].closed and not stand_ins["bertile"].closed
    assert stand_ins["bertile"].closed
