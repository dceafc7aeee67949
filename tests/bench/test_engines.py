"""Engines: each in a process of its own, warmed up, its errors told here."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import BertileError
from bertile.bench import peers
from bertile.bench.engines import Engine, Source
from bertile.bench.traffic import Traffic
from bertile.bench.workers import Worker


def test_worker_runs_onnx_runtime_in_its_own_process(tmp_path: Path) -> None:
    with started("onnxruntime", Source(tmp_path, _doubling_model(tmp_path))) as worker:
        assert worker.receive().startswith("ONNX Runtime 1.")
        inputs = {"x": np.array([1, 2], np.int64)}
        assert worker.outputs(inputs)[0].tolist() == [2, 4] and worker.pid
        assert len(worker.call(inputs, 3)) == 3


def test_worker_answers_several_callers_and_tells_its_processor_time(tmp_path: Path) -> None:
    with started("onnxruntime", Source(tmp_path, _doubling_model(tmp_path))) as worker:
        worker.receive()
        before = worker.cpu_seconds()
        requests = [{"x": np.arange(count)} for count in (1, 2, 3)]
        served = worker.drive(requests, Traffic(callers=3, count=12))
        assert len(served.milliseconds) == 12 and served.seconds > 0
        assert worker.cpu_seconds() >= before + served.cpu_seconds > before


def test_worker_runs_openvino_in_its_own_process(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with started("openvino", Source(tmp_path, _doubling_model(tmp_path))) as worker:
        assert worker.receive().startswith("OpenVINO 20")
        inputs = {"x": np.array([1, 2], np.int64)}
        assert worker.outputs(inputs)[0].tolist() == [2, 4]
        assert len(worker.drive([inputs], Traffic(callers=2, count=4)).milliseconds) == 4


def test_torch_runs_the_checkpoint_with_its_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # The number of threads between operations can be set once in a process, which is this one.
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda count: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    source = Source(Path(), model="synthetic:bert-tiny:embedding", head="embedding")
    infer, version = peers.OPENERS["torch"](Engine("torch", "torch", "fp32", source), 1)
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
    worker = Worker(Engine(name, name, "fp32", source), threads=1)
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
