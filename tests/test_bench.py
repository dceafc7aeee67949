"""The benchmark: engines in their own processes, in turns, on the same inputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile import bench, cli
from bertile.config import Config
from bertile.errors import BundleError, UsageError
from bertile.progress import Progress

MANIFEST = {
    "model": {"source": "minilm", "head": "embedding", "max_length": 32, "sha256": "old"},
    "static": {"length": None},
    "config": {},
    "outputs": [{"name": "y"}],
    "kernels": [],
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 10, "default": None},
        {"name": "attention_mask", "dtype": "int32", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
}
QUIET = {"others_percent": 1.0, "load": [0.1, 0.2, 0.3]}


class Engine:
    """Stands in for a worker: writes down when it is called."""

    pid = 0

    def __init__(self, name: str, milliseconds: float, calls: list[str]):
        self.name, self.milliseconds, self.calls = name, milliseconds, calls

    def receive(self) -> str:
        return self.name.title()

    def call(self, inputs: dict, count: int) -> list[float]:
        self.calls.append(self.name)
        return [self.milliseconds] * count

    def outputs(self, inputs: dict) -> list[np.ndarray]:
        return [np.full(2, self.milliseconds, np.float32)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAUSE_SECONDS", 0.0)


def report(**changes: Any) -> dict[str, Any]:
    rows = bench._measure(
        [Engine("bertile", 2.0, []), Engine("onnxruntime", 3.0, []), Engine("torch", 2.5, [])],
        bench.random_inputs(MANIFEST, 1, 16),
        5,
        Progress(-1),
    )
    made = {
        "rows": [{"model": "minilm", **bench._shares(row, 1e9, 1000.0)} for row in rows],
        "versions": {"bertile": "Bertile", "onnxruntime": "ONNX Runtime 1", "torch": "PyTorch 2"},
        "threads": 2,
        "repeat": 5,
        "cpu": "a processor",
        "peak_gflops": 1000.0,
        "busy": QUIET,
        "notes": [],
        "source": "minilm",
        "time": "2026-01-01",
    }
    return {**made, **changes}


def test_engines_take_turns_and_the_first_of_a_turn_changes() -> None:
    calls: list[str] = []
    ours, theirs = Engine("bertile", 2.0, calls), Engine("onnxruntime", 4.0, calls)
    inputs = bench.random_inputs(MANIFEST, 1, 16)
    rows = bench._measure([ours, theirs], inputs, 12, Progress(-1))  # type: ignore[list-item]
    forth = ["bertile", "onnxruntime"]
    assert calls == forth + forth[::-1] + forth
    assert [row["median_ms"] for row in rows] == [2.0, 4.0] and rows[0]["p99_ms"] == 2.0
    assert rows[1]["ratio"] == 0.5 and rows[1]["max_abs_difference"] == 2.0


def test_ratio_to_the_best_is_by_the_fastest_other_engine() -> None:
    ours, onnxruntime, torch = report()["rows"]
    assert ours["best_ratio"] == pytest.approx(2.0 / 2.5) and torch["best_ratio"] is None
    assert onnxruntime["ratio"] == pytest.approx(2.0 / 3.0)
    # 1 GFLOP in 2 ms is 500 GFLOP/s
    assert ours["gflops"] == pytest.approx(500) and ours["peak_percent"] == pytest.approx(50)


def test_random_inputs_are_valid_and_the_same_every_time() -> None:
    inputs = bench.random_inputs(MANIFEST, 3, 32)
    assert {name: array.shape for name, array in inputs.items()} == dict.fromkeys(inputs, (3, 32))
    assert inputs["input_ids"].max() < 10 and inputs["attention_mask"].dtype == np.int32
    assert inputs["attention_mask"].all() and not inputs["token_type_ids"].any()
    again = bench.random_inputs(MANIFEST, 3, 32)
    assert (inputs["input_ids"] == again["input_ids"]).all()


def test_length_past_the_maximum_is_refused() -> None:
    with pytest.raises(UsageError, match="length 33 is too much; the model takes at most 32"):
        bench.random_inputs(MANIFEST, 1, 33)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"against": ["onnxruntim"]}, "did you mean 'onnxruntime'?"),
        ({"batches": [0]}, "batch is 0"),
        ({"repeat": -1}, "repeat is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_choices_are_refused_before_anything_starts(choice: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench.bench(Path("/no/bundle"), **choice)
    assert message in str(caught.value)


def test_torch_is_left_out_with_a_sentence_for_a_foreign_onnx_file() -> None:
    manifest = {"model": {"source": "my.onnx"}}
    names, (note,) = bench.possible(["onnxruntime", "torch"], manifest)
    assert names == ["onnxruntime"] and "my.onnx is an ONNX file" in note
    assert bench.possible(["torch"], MANIFEST) == (["torch"], [])


def test_model_that_changed_since_it_was_compiled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertile.model_files.fingerprint", lambda model, head: "new")
    with pytest.raises(BundleError, match="'minilm' has changed since out was compiled"):
        bench.source(Path("out"), MANIFEST, ["torch"], None, None)


def test_bench_of_a_model_compiles_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    monkeypatch.setattr("bertile.driver.compile", lambda *given: made.append(given))
    monkeypatch.setattr(bench, "bench", lambda directory, onnx, **choices: (directory, choices))
    config = Config(threads=2, cache_dir="cache")
    ((directory, choices),) = bench.bench_models(["minilm"], config, Progress(-1), repeat=3)
    assert made[0][:2] == ("minilm", directory) and not directory.parent.exists()
    assert {**choices, "progress": None} == {
        "threads": 2,
        "cache_dir": "cache",
        "repeat": 3,
        "progress": None,
    }


def test_command_takes_blanks_and_commas(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen: dict[str, Any] = {}

    def run(targets: list[str], config: Config, progress: Progress, **choices: Any) -> list[dict]:
        seen.update(choices, targets=targets)
        return [report()]

    monkeypatch.setattr(bench, "bench_models", run)
    line = ["bench", "out", "--against", "onnxruntime,openvino", "torch", "--length", "16,32", "64"]
    assert cli.main([*line, "--json", "-q"]) == 0
    assert seen["against"] == ["onnxruntime", "openvino", "torch"]
    assert (seen["lengths"], seen["batches"], seen["targets"]) == ([16, 32, 64], [1], ["out"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["engine"] == "bertile"
    assert cli.main(["bench", "out", "--batch", "1,x"]) == 2
    assert "--batch is 'x'" in capsys.readouterr().err


def test_startup_measures_each_engine_in_a_fresh_process(monkeypatch, tmp_path):
    from bertile import startup

    manifest = {
        "model": {"source": "m", "max_length": 8},
        "static": {"length": None},
        "inputs": [{"name": "input_ids", "dtype": "int64", "below": 9, "default": None}],
        "files": {"params.safetensors": {"bytes": 5_000_000}},
    }
    started = []

    class Stub:
        pid = os.getpid()

        def __init__(self, name, source, threads):
            started.append(name)

        receive = close = lambda self: None

        def outputs(self, inputs):
            assert inputs["input_ids"].shape == (1, 4)

    monkeypatch.setattr(startup, "Worker", Stub)
    monkeypatch.setattr(startup.loader, "read_manifest", lambda directory: manifest)
    monkeypatch.setattr(startup.bench, "source", lambda *args: None)
    report = startup.startup(tmp_path, against=("openvino",), length=4, repeat=2)
    assert started == ["bertile", "openvino"] * 2
    assert [row["weights_mb"] for row in report["rows"]] == [5.0, 5.0]
    assert all(row["resident_mb"] > 1 for row in report["rows"])
    assert "first result ms" in startup.as_table(report)
