"""From ONNX to Relax: weights apart, scalars bound, axes symbolic, errors that name the cause."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax

from bertile.base.errors import ModelError
from bertile.graph.importer import TABLE, import_onnx
from bertile.onnx.exported import ExportedModel, InputSpec

MODEL = """
<ir_version: 9, opset_import: ["" : 20]>
small ({dtype}[{batch},{length}] input_ids) => (float[{batch},{length},4] y) {{
  x = Gather(words, input_ids)
  scaled = Mul(x, half)
  moved = Add(scaled, shift)
  wide = MatMul(moved, w)
  y = Reshape(wide, keep)
}}
"""
VALUES = {
    "words": np.arange(40, dtype="float32").reshape(10, 4),
    "half": np.array(0.5, "float32"),
    "shift": np.array([3.0], "float32"),
    "w": np.eye(4, dtype="float32"),
    "keep": np.array([0, 0, 4], "int64"),
}


def written(directory, batch="batch", length="length", dtype="int64") -> ExportedModel:
    model = onnx.parser.parse_model(MODEL.format(batch=batch, length=length, dtype=dtype))
    for name, value in VALUES.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, directory / "model.onnx")
    return described(directory, dtype)


def described(directory, dtype="int64") -> ExportedModel:
    spec = InputSpec("input_ids", dtype)
    return ExportedModel(directory, "", "", "unknown", "unknown", None, (spec,), ("y",))


def calls_of(graph):
    bindings = [b for block in graph.main.body.blocks for b in block.bindings]
    return [b.value for b in bindings if isinstance(b.value, relax.Call)]


def test_float_tensors_with_an_axis_become_weights(tmp_path):
    graph = import_onnx(written(tmp_path))
    assert set(graph.params) == {"words", "w"}
    assert all(np.array_equal(graph.params[name], VALUES[name]) for name in graph.params)
    assert [param.name for param in graph.main.params] == ["input_ids", TABLE, *graph.params]
    for param in graph.main.params[2:]:
        assert tuple(int(e) for e in param.ty.shape) == VALUES[param.name].shape


def test_scalars_are_bound_as_constants(tmp_path):
    calls = calls_of(import_onnx(written(tmp_path)))
    (product,) = (call for call in calls if call.op.name == "relax.multiply")
    constants = [a for a in product.args if isinstance(a, tvm.ir.GenericConst)]
    assert [float(constant.value.numpy()) for constant in constants] == [0.5]


def test_block_table_stands_after_the_inputs(tmp_path):
    main = import_onnx(written(tmp_path)).main
    assert int(main.attrs["num_input"]) == 2
    assert str(main.params[1].ty.dtype) == "int32"
    blocks, columns = main.params[1].ty.shape
    assert isinstance(blocks, tvm.tirx.Var) and int(columns) == 4


def test_symbolic_axes_stay_symbolic(tmp_path):
    main = import_onnx(written(tmp_path)).main
    batch, length = main.params[0].ty.shape
    assert isinstance(batch, tvm.tirx.Var) and isinstance(length, tvm.tirx.Var)
    result = main.ret_ty.shape
    assert result[0].same_as(batch) and result[1].same_as(length) and int(result[2]) == 4


def test_static_axes_stay_static(tmp_path):
    main = import_onnx(written(tmp_path, batch=2, length=7)).main
    assert [int(e) for e in main.ret_ty.shape] == [2, 7, 4]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_dtype_of_the_ids_is_kept(tmp_path, dtype):
    main = import_onnx(written(tmp_path, dtype=dtype)).main
    assert str(main.params[0].ty.dtype) == dtype


def test_imported_module_is_well_formed(tmp_path):
    relax.analysis.well_formed(import_onnx(written(tmp_path)).mod)  # raises where it is not


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.onnx.*not a readable ONNX model"):
        import_onnx(described(tmp_path))


@pytest.mark.parametrize("keep", [0, 100], ids=["not ONNX", "truncated"])
def test_file_that_is_no_model_is_named(tmp_path, keep):
    exported = written(tmp_path)
    content = exported.onnx_path.read_bytes()
    exported.onnx_path.write_bytes(content[:keep] if keep else b"GIF89a, no model at all")
    with pytest.raises(ModelError, match="not a readable ONNX model"):
        import_onnx(exported)


def test_operator_that_tvm_lacks_is_named(tmp_path):
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20, "com.example" : 1]>
        small (int64[batch,length] input_ids) => (float[batch,length] y) {
          x = Cast<to = 1>(input_ids)
          y = com.example.Wobble(x)
        }
        """
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="Wobble") as raised:
        import_onnx(described(tmp_path))
    assert "\n" not in str(raised.value)
