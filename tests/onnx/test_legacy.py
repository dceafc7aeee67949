"""The model in older operators: the same numbers, and what old tools look for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from bertile.base.errors import ModelError
from bertile.onnx import legacy
from bertile.onnx.exported import ExportedModel
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.samples import run_onnx, sample


def test_model_computes_the_same_in_opset_17(exported: ExportedModel, tmp_path: Path) -> None:
    legacy.rewrite(exported.onnx_path, tmp_path / "old.onnx")
    old = onnx.load(tmp_path / "old.onnx")
    assert old.opset_import[0].version == 17 and old.ir_version == 8
    kinds = [node.op_type for node in old.graph.node]
    assert not {"Gelu", "LayerNormalization"} & set(kinds) and "Erf" in kinds
    assert kinds.count("Unsqueeze") == 2  # the mask's two axes, one after the other
    inputs = sample(exported.inputs, 3, 17, padding_id=0)
    before, after = (run_onnx(path, inputs) for path in (exported.onnx_path, tmp_path / "old.onnx"))
    assert list(before) == list(after)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-5)


def test_optimizer_of_onnx_runtime_knows_every_part(
    exported: ExportedModel, tmp_path: Path
) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    legacy.rewrite(exported.onnx_path, tmp_path / "old.onnx")
    fused = optimizer.optimize_model(
        str(tmp_path / "old.onnx"), "bert", num_heads=0, hidden_size=0, opt_level=0
    )
    counts = fused.get_fused_operator_statistics()
    assert (counts["Attention"], counts["BiasGelu"], counts["SkipLayerNormalization"]) == (2, 2, 4)


def test_what_opset_17_lacks_is_refused(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, kind, [2]) for name in "xy"]
    node = helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ModelError, match="cannot be written in ONNX opset 17"):
        legacy.rewrite(tmp_path / "new.onnx", tmp_path / "old.onnx")


def test_new_names_are_behind_those_of_an_earlier_export(exported: ExportedModel) -> None:
    graph = OnnxGraph(onnx.load(exported.onnx_path))
    taken = {name for node in graph.nodes for name in (*node.input, *node.output)}
    assert any(name.startswith("bertile.") for name in taken)
    assert not {graph.fresh(hint) for hint in ("shape", "scores", "mul") for _ in range(9)} & taken
