"""The benchmark: engines in their own processes, in turns, on the same inputs."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile import bench, bench_tables, cli, engines, machine, work
from bertile.config import Config
from bertile.engines import Source, Worker
from bertile.errors import BertileError, BundleError, UsageError
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


def test_every_turn_is_warmed_up_and_only_what_follows_is_measured() -> None:
    done = []
    times = engines.timed(lambda inputs: done.append(1) or [], {}, 4)
    assert len(times) == 4 and len(done) == engines.WARM_UP_LIMIT + 4


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
    names, (note,) = bench._possible(["onnxruntime", "torch"], manifest)
    assert names == ["onnxruntime"] and "my.onnx is an ONNX file" in note
    assert bench._possible(["torch"], MANIFEST) == (["torch"], [])


def test_model_that_changed_since_it_was_compiled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertile.model_files.fingerprint", lambda model, head: "new")
    with pytest.raises(BundleError, match="'minilm' has changed since out was compiled"):
        bench._source(Path("out"), MANIFEST, ["torch"], None, None)


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


def test_table_is_text_markdown_or_csv() -> None:
    text = bench_tables.as_table([report()])
    assert "8000" in text and "2 threads" in text and "ONNX Runtime 1" in text
    markdown = bench_tables.as_table([report()], markdown=True).splitlines()
    assert markdown[0].startswith("| model") and "0.67" in markdown[3] and "0.80" in markdown[2]
    rows = list(csv.DictReader(bench_tables.as_csv([report(), report()]).splitlines()))
    assert len(rows) == 6 and float(rows[1]["ratio"]) == pytest.approx(2 / 3)
    assert rows[0]["best_ratio"] and rows[1]["best_ratio"] == "" and rows[2]["threads"] == "2"


def test_facts_say_that_the_machine_was_busy_and_what_was_left_out() -> None:
    busy = {"others_percent": 35.2, "load": [2.0, 1.0, 1.0]}
    text = bench_tables.facts([report(), report(busy=busy, notes=["torch is left out"])])
    assert "The machine was busy: other processes took 35%" in text and "Torch is left out." in text
    assert "busy" not in bench_tables.facts([report()])


def test_readme_is_changed_between_the_markers_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("above\n<!-- bench -->\nold \\1\n<!-- /bench -->\nbelow\n")
    for _ in range(2):
        bench_tables.update_readme(path, [report()], "bertile bench \\1 minilm")
    text = path.read_text()
    assert text.startswith("above\n<!-- bench -->\n| model") and text.endswith("-->\nbelow\n")
    assert "old" not in text and "`bertile bench \\1 minilm`" in text and "2026-01-01" in text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "<!-- /bench --> <!-- bench -->", "<!-- bench -->"])
def test_readme_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UsageError, match="has no place for the table"):
        bench_tables.update_readme(path, [report()], "bertile bench")
    assert path.read_text() == text


def test_watch_tells_our_cpu_time_from_that_of_others(tmp_path: Path) -> None:
    import os

    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / "7").mkdir()

    def write(busy: int, steal: int, idle: int, ours: int) -> None:
        (tmp_path / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 0\n")
        for pid in (os.getpid(), 7):
            text = f"{pid} (a name) ) R {'0 ' * 10}{ours} {ours} 0\n"
            (tmp_path / str(pid) / "stat").write_text(text)

    write(0, 0, 0, 0)
    watch = machine.Watch([7], tmp_path)
    write(busy=60, steal=20, idle=20, ours=10)  # 4 × 10 ticks are ours
    assert watch.busy()["others_percent"] == 40.0
    (tmp_path / "stat").unlink()
    assert watch.busy()["others_percent"] is None
    assert "not known" in machine.busy_sentence({"others_percent": None, "load": []})


def test_work_counts_attention_by_sequence_and_a_pooler_by_first_tokens() -> None:
    pytest.importorskip("tvm")
    dense = {"inputs": 4, "outputs": 8, "activation": "none", "residual": False}
    kernels = [
        {"operation": "dense", "shape": dense, "calls": 2},
        {"operation": "attention", "shape": {"heads": 2, "head_size": 4}, "calls": 1},
        {"operation": "generic", "shape": {}, "calls": 3},
        {"operation": "first_token", "shape": {"channels": 4}, "calls": 1},
        {"operation": "dense", "shape": {**dense, "activation": "tanh"}, "calls": 1},
    ]
    batch, length = 3, 5
    products = 2 * 2 * batch * length * 4 * 8
    attention = batch * 4 * length * length * 2 * 4
    pooler = 2 * batch * 4 * 8
    assert work.request_flops(kernels, batch, length) == products + attention + pooler


def test_worker_runs_onnx_runtime_in_its_own_process(tmp_path: Path) -> None:
    with started("onnxruntime", Source(tmp_path, _doubling_model(tmp_path))) as worker:
        assert worker.receive().startswith("ONNX Runtime 1.")
        inputs = {"x": np.array([1, 2], np.int64)}
        assert worker.outputs(inputs)[0].tolist() == [2, 4] and worker.pid
        assert len(worker.call(inputs, 3)) == 3


def test_worker_runs_openvino_in_its_own_process(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with started("openvino", Source(tmp_path, _doubling_model(tmp_path))) as worker:
        assert worker.receive().startswith("OpenVINO 20")
        assert worker.outputs({"x": np.array([1, 2], np.int64)})[0].tolist() == [2, 4]


def test_torch_runs_the_checkpoint_with_its_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # The number of threads between operations can be set once in a process, which is this one.
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    source = Source(Path(), model="synthetic:bert-tiny:embedding", head="embedding")
    infer, version = engines._torch(source, 1)
    ids = np.ones((2, 4), np.int64)
    (vectors,) = infer({"input_ids": ids, "attention_mask": ids})
    assert version.startswith("PyTorch 2")
    assert vectors.ndim == 2 and np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])


def test_error_in_the_other_process_is_raised_here(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with started("onnxruntime", Source(tmp_path, tmp_path / "broken.onnx")) as worker:
        with pytest.raises(BertileError, match="onnxruntime: "):
            worker.receive()


def test_process_that_dies_is_named(tmp_path: Path) -> None:
    with started("onnxruntime", Source(tmp_path, tmp_path / "model.onnx")) as worker:
        worker._process.kill()
        with pytest.raises(BertileError, match="the process of onnxruntime ended with code -9"):
            worker.receive()


@contextlib.contextmanager
def started(name: str, source: Source):
    worker = Worker(name, source, threads=1)
    try:
        yield worker
    finally:
        worker.close()


def _doubling_model(directory: Path) -> Path:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    kind, helper = onnx.TensorProto.INT64, onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", kind, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, directory / "double.onnx")
    return directory / "double.onnx"
