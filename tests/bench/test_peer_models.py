"""Peers' own forms of the model: they run, compute nearly the same, and are made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from bertile.base.errors import ModelError
from bertile.base.progress import Progress
from bertile.bench import peer_models
from bertile.bench.engines import Engine, Source
from bertile.bench.sameness import cosine
from bertile.bench.workers import Worker
from bertile.config import Config
from bertile.export import cached
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import run_onnx, sample

QUIET = Progress(-1)


def form(kind: str, precision: str, exported: ExportedModel, tmp_path: Path) -> Path:
    arguments = (kind, precision, exported.onnx_path, exported, str(tmp_path), QUIET)
    path = peer_models.prepared(*arguments)
    assert path is not None
    return path


def test_file_is_used_as_it_is_where_the_engine_takes_it(exported: ExportedModel) -> None:
    path = exported.onnx_path
    assert peer_models.prepared("openvino", "bf16", path, exported, None, QUIET) == path
    assert peer_models.prepared("onnxruntime", "int8", None, exported, None, QUIET) is None


def test_model_that_the_engines_own_tools_fail_on_is_named(
    exported: ExportedModel, tmp_path: Path
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    arguments = ("onnxruntime", "int8", broken, exported, str(tmp_path / "cache"), QUIET)
    with pytest.raises(ModelError, match="onnxruntime cannot make its int8 form: "):
        peer_models.prepared(*arguments)


@pytest.mark.parametrize(
    ("kind", "products"),
    [
        ("onnxruntime", {"MatMulInteger", "DynamicQuantizeLinear"}),
        ("deepsparse", {"QLinearMatMul"}),
    ],
)
def test_int8_form_computes_nearly_the_same_in_bytes(
    exported: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    products: set[str],
) -> None:
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(peer_models, "CALIBRATION_SAMPLES", 8)
    peer_models.FORMS[kind, "int8"][1](exported.onnx_path, exported, path)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert products <= kinds
    inputs = sample(exported.inputs, 1, 24, padding_id=0)
    want, got = (list(run_onnx(model, inputs).values()) for model in (exported.onnx_path, path))
    assert 0.98 < cosine(want, got) < 0.999999
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_int4_form_computes_nearly_the_same_in_four_bits(
    exported: ExportedModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    peer_models.FORMS["onnxruntime", "int4"][1](exported.onnx_path, exported, path)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    values = [{field.name: field.i for field in node.attribute} for node in nodes]
    assert {(v["bits"], v["block_size"], v["accuracy_level"]) for v in values} == {(4, 32, 4)}
    # of two layers; where fusing the attention was faster, its products are none of these
    assert len(nodes) >= 2 * 3
    inputs = sample(exported.inputs, 1, 24, padding_id=0)
    want, got = (list(run_onnx(model, inputs).values()) for model in (exported.onnx_path, path))
    assert 0.8 < cosine(want, got) < 0.999
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_form_is_made_in_another_process_and_kept(exported: ExportedModel, tmp_path: Path) -> None:
    first = form("deepsparse", "fp32", exported, tmp_path)
    made_at = first.stat().st_mtime_ns
    assert form("deepsparse", "fp32", exported, tmp_path) == first
    assert first.stat().st_mtime_ns == made_at
    inputs = sample(exported.inputs, 1, 24, padding_id=0)
    want, got = (list(run_onnx(model, inputs).values()) for model in (exported.onnx_path, first))
    assert cosine(want, got) == pytest.approx(1)


def test_samples_are_the_models_inputs(exported: ExportedModel) -> None:
    samples = peer_models._samples(exported)
    assert len(samples) == peer_models.CALIBRATION_SAMPLES
    assert all(set(arrays) == {spec.name for spec in exported.inputs} for arrays in samples)
    assert not np.array_equal(samples[0]["input_ids"], samples[1]["input_ids"])


@pytest.mark.slow
def test_openvino_runs_what_nncf_has_quantized(exported: ExportedModel, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    path = form("openvino", "int8", exported, tmp_path)
    assert b"FakeQuantize" in path.read_bytes()
    worker = Worker(Engine("openvino", "openvino", "int8", Source(Path(), path)), 1)
    try:
        assert worker.receive().startswith("OpenVINO")
        inputs = sample(exported.inputs, 1, 24, padding_id=0)
        want = list(run_onnx(exported.onnx_path, inputs).values())
        assert 0.98 < cosine(want, worker.outputs(inputs)) < 0.999999
    finally:
        worker.close()


@pytest.fixture(scope="module")
def pruned() -> ExportedModel:
    """Nine of ten blocks of 4 inputs of one output are zero in every linear layer."""
    return cached.export_cached("synthetic:bert-tiny@0.9:4x1", Config())


PRUNED_ELEMENTS = 2 * (4 * 128 * 128 + 2 * 128 * 512)  # of two layers, without the pooler


def elements_with_zero_blocks(weights: list[np.ndarray]) -> int:
    """Of the w (K, N) of which nine of ten blocks of 4 inputs are zero."""
    shares = [float((w.reshape(len(w) // 4, 4, -1) == 0).all(1).mean()) for w in weights]
    return sum(w.size for w, share in zip(weights, shares) if abs(share - 0.9) < 0.02)


@pytest.mark.parametrize("kind", ["onnxruntime", "deepsparse"])
def test_int8_form_keeps_the_zeros_of_a_pruned_model(
    pruned: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    places = {"MatMulInteger": 1, "QAttention": 1, "QLinearMatMul": 3}
    monkeypatch.setattr(peer_models, "CALIBRATION_SAMPLES", 4)
    peer_models.FORMS[kind, "int8"][1](pruned.onnx_path, pruned, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    names = [node.input[places[node.op_type]] for node in graph.node if node.op_type in places]
    weights = [values[name] for name in names if name in values]
    assert {array.dtype for array in weights} == {np.dtype("int8")}
    assert elements_with_zero_blocks(weights) == PRUNED_ELEMENTS


@pytest.mark.slow
def test_openvinos_int8_form_keeps_the_zeros_of_a_pruned_model(
    pruned: ExportedModel, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    path = form("openvino", "int8", pruned, tmp_path)
    operators = openvino.Core().read_model(path).get_ops()
    constants = [operator for operator in operators if operator.get_type_name() == "Constant"]
    arrays = [
        operator.data
        for operator in constants
        if operator.get_element_type().get_type_name() == "i8"
    ]
    weights = [array for array in arrays if array.ndim == 2 and len(array) % 4 == 0]
    assert elements_with_zero_blocks(weights) == PRUNED_ELEMENTS
