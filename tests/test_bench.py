"""The benchmark: engines in their own processes, in turns, on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bertile import bench
from bertile.errors import BertileError, UsageError
from bertile.progress import Progress

MANIFEST = {
    "model": {"max_length": 32},
    "static": {"length": None},
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 10, "default": None},
        {"name": "attention_mask", "dtype": "int32", "below": 2, "default": "ones"},
        {"name": "token_type_ids", "dtype": "int64", "below": 2, "default": "zeros"},
    ],
}


class Engine:
    """Stands in for a worker: writes down when it is called."""

    def __init__(self, name: str, milliseconds: float, calls: list[str]):
        self.name, self.milliseconds, self.calls = name, milliseconds, calls

    def call(self, inputs: dict, count: int) -> tuple[list[float], list[np.ndarray]]:
        self.calls.append(self.name)
        slow_first = [100.0] * bench.WARM_UP + [self.milliseconds] * (count - bench.WARM_UP)
        return slow_first, [np.full(2, self.milliseconds, np.float32)]


def test_engines_take_turns_and_warm_up_is_not_measured() -> None:
    calls: list[str] = []
    engines = [Engine("bertile", 2.0, calls), Engine("onnxruntime", 3.0, calls)]
    inputs = bench.random_inputs(MANIFEST, 1, 16)
    ours, theirs = bench._measure(engines, inputs, 12, Progress(-1))  # type: ignore[arg-type]
    assert calls == ["bertile", "onnxruntime"] * 3
    assert (ours["median_ms"], ours["ratio"], theirs["ratio"]) == (2.0, 1.0, 1.5)
    assert theirs["max_abs_difference"] == 1.0 and ours["p90_ms"] == 2.0


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


def test_worker_runs_onnx_runtime_in_its_own_process(tmp_path: Path) -> None:
    path = _doubling_model(tmp_path)
    worker = bench.Worker("onnxruntime", path, threads=1)
    try:
        assert worker.receive().startswith("ONNX Runtime 1.")
        times, (output,) = worker.call({"x": np.array([1, 2], np.int64)}, 3)
        assert len(times) == 3 and output.tolist() == [2, 4]
    finally:
        worker.close()


def test_error_in_the_other_process_is_raised_here(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    worker = bench.Worker("onnxruntime", tmp_path / "broken.onnx", threads=1)
    try:
        with pytest.raises(BertileError, match="onnxruntime: "):
            worker.receive()
    finally:
        worker.close()


def test_process_that_dies_is_named() -> None:
    pytest.importorskip("onnxruntime")
    worker = bench.Worker("onnxruntime", Path("model.onnx"), threads=1)
    worker._process.kill()
    with pytest.raises(BertileError, match="the process of onnxruntime ended with code -9"):
        worker.receive()
    worker.close()


def test_table_is_text_or_markdown() -> None:
    row = {"engine": "bertile", "batch": 1, "length": 128, "median_ms": 2.0, "p90_ms": 2.5}
    report = {
        "rows": [{**row, "ratio": 1.0}],
        "versions": {"bertile": "Bertile"},
        "threads": 2,
        "source": "minilm",
    }
    assert "64000" in bench.as_table(report) and "minilm, 2 threads" in bench.as_table(report)
    assert bench.as_table(report, markdown=True).startswith("| engine")


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
