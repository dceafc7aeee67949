"""The benchmark: reports on a bundle and its peers, sizes, shares of the peak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile.base.errors import UsageError
from bertile.base.progress import Progress
from bertile.bench import benchmark
from bertile.bench.engines import Engine, Source
from bertile.bench.workloads import Mix
from bertile.cli import main
from bertile.config import Config
from bertile.numerics.precision import PRECISIONS
from bertile.run import requests

MANIFEST = {
    "model": {"source": "minilm", "head": "embedding", "max_length": 32, "sha256": "old"},
    "static": {"length": None},
    "config": {},
    "outputs": [{"name": "y"}],
    "kernels": [],
    "files": {"params.safetensors": {"bytes": 5_000_000}},
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 10, "default": None},
        {"name": "attention_mask", "dtype": "int32", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
}


def measured_report(
    monkeypatch: pytest.MonkeyPatch, precisions: dict[str, str], **choices: Any
) -> dict:
    """A report in which nothing was measured: engines take 2 ms, 3 ms, … and give one vector."""
    source = Source(Path("out"), Path("model.onnx"))
    engines = [Engine(name, name, precision, source) for name, precision in precisions.items()]
    calls = {engine.name: 2.0 + number for number, engine in enumerate(engines)}

    class Worker:
        pid = 0

        def __init__(self, engine: Engine, threads: int, cache_dir: str | None = None):
            self.engine, self.name = engine, engine.name

        def receive(self) -> str:
            return self.name.title()

        def call(self, inputs: dict, count: int) -> list[float]:
            return [calls[self.name]] * count

        def outputs(self, inputs: dict) -> list[np.ndarray]:
            angle = {"int8": 0.1, "bf16": 0.01}.get(self.engine.precision, 0.0)
            return [np.array([[np.cos(angle), np.sin(angle)]], np.float32)]

        def close(self) -> None:
            pass

    def facts(kernels: list, target: str, threads: int, sizes: list, precisions: list) -> tuple:
        return {name: 1000.0 for name in precisions if name != "bf16"}, [1e9] * len(sizes)

    monkeypatch.setattr("bertile.bench.turns.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("bertile.bench.turns.start", Worker)
    monkeypatch.setattr("bertile.bench.sameness.Worker", Worker)
    monkeypatch.setattr("bertile.bench.startup.start", Worker)
    monkeypatch.setattr("bertile.bench.startup._resident_mb", lambda pid: 7.0)
    monkeypatch.setattr(benchmark.loader, "read_manifest", lambda directory: MANIFEST)
    monkeypatch.setattr(benchmark.competitors, "engines", lambda *arguments: (engines, ["a note"]))
    monkeypatch.setattr(benchmark.roofline, "facts_in_own_process", facts)
    return benchmark.bench(Path("out"), threads=2, repeat=3, **choices)


def test_report_has_a_row_per_engine_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions = {"bertile": "fp32", "onnxruntime": "fp32"}
    report = measured_report(monkeypatch, precisions, lengths=[8, 16], batches=[1, 2])
    sizes = [(row["batch"], row["length"], row["engine"]) for row in report["rows"]]
    assert len(set(sizes)) == 8 and report["notes"] == ["a note"]
    ours, theirs = report["rows"][:2]
    # 1 GFLOP in 2 ms is 500 GFLOP/s
    assert ours["gflops"] == pytest.approx(500) and ours["peak_percent"] == pytest.approx(50)
    assert (ours["tokens_per_s"], theirs["ratio"]) == (pytest.approx(4000), pytest.approx(2 / 3))
    assert report["versions"]["onnxruntime"] == "Onnxruntime" and "startup" not in report


def test_lower_precisions_are_compared_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured_report(monkeypatch, {"bertile": "int8", "openvino:bf16": "bf16"}, lengths=[8])
    ours, theirs = report["rows"]
    assert ours["cosine"] == pytest.approx(np.cos(0.1))
    assert theirs["cosine"] == pytest.approx(np.cos(0.01))
    assert theirs["peak_percent"] is None and ours["peak_percent"]  # no peak was measured in bf16
    assert set(report["peaks_gflops"]) == {"int8"} and report["notes"] == ["a note"]


def test_outputs_of_another_model_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = PRECISIONS["int8"]._replace(cosine=0.999)
    monkeypatch.setitem(PRECISIONS, "int8", strict)
    report = measured_report(
        monkeypatch, {"bertile": "fp32", "onnxruntime:int8": "int8"}, lengths=[8]
    )
    (_, note) = report["notes"]
    assert (
        note
        == "onnxruntime:int8's outputs have a cosine of 0.9950 to float32's: not the same model"
    )


def test_request_of_mixed_lengths_counts_what_is_no_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mix = Mix("4,8", (4, 8), (0.5, 0.5))
    report = measured_report(
        monkeypatch, {"bertile": "fp32", "torch": "fp32"}, lengths=[mix], batches=[2]
    )
    ours, theirs = report["rows"]
    assert (ours["batch"], ours["length"], theirs["length"]) == (2, "4,8", "4,8")
    # each sequence is one GFLOP here; together in 2 ms
    assert ours["gflops"] == pytest.approx(1000)
    assert ours["tokens_per_s"] == pytest.approx(6000)


def test_startup_is_a_second_list_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions = {"bertile": "fp32", "onnxruntime": "fp32"}
    report = measured_report(monkeypatch, precisions, lengths=[8, 16], startup=True)
    ours, theirs = report["startup"]
    assert (ours["engine"], theirs["engine"]) == ("bertile", "onnxruntime")
    assert (ours["batch"], ours["length"], ours["model"]) == (1, 8, "minilm")
    assert (ours["weights_mb"], theirs["resident_mb"]) == (5.0, 7.0)


def test_random_inputs_are_valid_and_the_same_every_time() -> None:
    inputs = requests.random_inputs(MANIFEST, 3, 32)
    assert {name: array.shape for name, array in inputs.items()} == dict.fromkeys(inputs, (3, 32))
    assert inputs["input_ids"].max() < 10 and inputs["attention_mask"].dtype == np.int32
    assert inputs["attention_mask"].all() and not inputs["token_type_ids"].any()
    again = requests.random_inputs(MANIFEST, 3, 32)
    assert (inputs["input_ids"] == again["input_ids"]).all()


@pytest.mark.parametrize(
    ("most", "static", "length"),
    [(None, None, 128), (512, None, 128), (32, None, 32), (512, 16, 16), (512, 384, 384)],
)
def test_usual_length_is_what_the_model_takes(most, static, length) -> None:
    model = {**MANIFEST["model"], "max_length": most}
    manifest = {**MANIFEST, "model": model, "static": {"length": static}}
    assert requests.usual_length(manifest) == length
    assert requests.random_inputs(manifest, 1, length)["input_ids"].shape == (1, length)


def test_bench_takes_the_usual_length_where_none_is_asked_for(monkeypatch) -> None:
    report = measured_report(monkeypatch, {"bertile": "fp32"})
    assert [row["length"] for row in report["rows"]] == [32]


def test_length_past_the_maximum_is_refused() -> None:
    with pytest.raises(UsageError, match="length 33 is too much; the model takes at most 32"):
        requests.random_inputs(MANIFEST, 1, 33)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"batches": [0]}, "batch is 0"),
        ({"repeat": -1}, "repeat is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_choices_are_refused_before_anything_starts(choice: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        benchmark.bench(Path("/no/bundle"), **choice)
    assert message in str(caught.value)


def test_bench_of_a_model_compiles_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple] = []
    monkeypatch.setattr("bertile.driver.compile", lambda *arguments: compiled.append(arguments))
    monkeypatch.setattr(benchmark, "bench", lambda directory, onnx, **choices: (directory, choices))
    config = Config(threads=2, cache_dir="cache")
    ((directory, choices),) = benchmark.bench_models(["minilm"], config, Progress(-1), repeat=3)
    assert compiled[0][:2] == ("minilm", directory) and not directory.parent.exists()
    assert {**choices, "progress": None} == {
        "threads": 2,
        "cache_dir": "cache",
        "repeat": 3,
        "progress": None,
    }


def test_unknown_peer_is_refused_before_the_model_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertile.driver.compile", lambda *arguments: pytest.fail("compiled"))
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        benchmark.bench_models(["minilm"], Config(), Progress(-1), against=["none", "onnxruntim"])


def test_command_takes_blanks_and_commas(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen: dict[str, Any] = {}

    def run(targets: list[str], config: Config, progress: Progress, **choices: Any) -> list[dict]:
        seen.update(choices, targets=targets)
        return [{"rows": [{"engine": "bertile"}]}]

    monkeypatch.setattr(benchmark, "bench_models", run)
    monkeypatch.setattr("bertile.bench.result_tables.as_table", lambda reports, markdown: "a table")
    line = ["bench", "out", "--against", "onnxruntime,openvino", "torch", "--length", "16,32", "64"]
    assert main.main([*line, "--json", "-q"]) == 0
    assert seen["against"] == ["onnxruntime", "openvino", "torch"]
    assert (seen["lengths"], seen["batches"], seen["targets"]) == ([16, 32, 64], [1], ["out"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["engine"] == "bertile"
    assert main.main(["bench", "out", "--batch", "1,x"]) == 2
    assert "--batch is 'x'" in capsys.readouterr().err
