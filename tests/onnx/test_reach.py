"""Outputs that see other rows, or padding, are found, and computed so that they may."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import bertile
from bertile.base.errors import ModelError
from bertile.loader import InputError
from bertile.loading.blocks import passes
from bertile.loading.padding import cut
from bertile.onnx.exported import InputSpec
from bertile.onnx.reach import mixing, padded

INPUTS = (InputSpec("input_ids", below=50), InputSpec("attention_mask", below=2, default="ones"))
# What each makes of pooled (batch, 8), with its shape: whether rows see each other.
MIXED = {
    "centred": (["ReduceMean keepdims=1 axis0", "Sub"], ["batch", 8]),
    "mean": (["ReduceMean keepdims=0 axis0"], [8]),
    "similarity": (["Transpose", "MatMul"], ["batch", "batch"]),
    "running sum": (["CumSum"], ["batch", 8]),
    "share of all": (["Softmax axis=0"], ["batch", 8]),
    "sorted": (["TopK"], [1, 8]),
}
APART = {
    "pooled": ([], ["batch", 8]),
    "doubled": (["Add self"], ["batch", 8]),
    "one number": (["ReduceMean keepdims=0 axis1"], ["batch"]),
}
# What sees padding: ids that are masked, or how many of them there are.
PADDED = {
    "mean of all": (["ReduceMean keepdims=0 axis1 tokens", "Sub"], ["batch", 8]),
    "by the length": (["ReduceMean keepdims=0 axis1 masked", "Sub"], ["batch", 8]),
    "largest": (["ReduceMax keepdims=0 axis1 tokens", "Sub"], ["batch", 8]),
}
# And what does not: these are of one token, or show masked positions at their own place alone.
MASKED = {
    "pooled": ([], ["batch", 8]),
    "by token": (["Identity tokens"], ["batch", "length", 8]),
    "length first": (["Transpose tokens perm"], ["length", "batch", 8]),
}


def model(steps: list[str], shape: list[int | str], batch: int | str = "batch") -> onnx.ModelProto:
    """The mean of the embeddings of a row's tokens, and the steps after it."""
    random = np.random.default_rng(0)
    table = random.standard_normal((50, 8)).astype("float32")
    constants = {
        "table": table,
        "axis0": np.array([0]),
        "axis1": np.array([1]),
        "axis2": np.array([2]),
        "zero": np.array(0),
        "one": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis2"], ["weights"]),
        helper.make_node("Mul", ["tokens", "weights"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis1"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["weights", "axis1"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["pooled"]),
    ]
    value = "pooled"
    for place, step in enumerate(steps):
        operator, *words = step.split()
        attributes = {k: int(v) for k, v in (word.split("=") for word in words if "=" in word)}
        operands = [word for word in words if word.startswith("axis") and "=" not in word]
        operands += {"CumSum": ["zero"], "TopK": ["one"], "Add": [value]}.get(operator, [])
        if operator == "TopK":
            attributes["axis"] = 0
        if "perm" in words:
            attributes["perm"] = [1, 0, 2]
        left = {"Sub": ["pooled", value], "MatMul": ["pooled", value]}.get(operator, [value])
        left = [word for word in words if word in ("tokens", "masked")] or left
        outputs = [f"step{place}", f"where{place}"] if operator == "TopK" else [f"step{place}"]
        nodes.append(helper.make_node(operator, [*left, *operands], outputs, **attributes))
        value = f"step{place}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    feeds = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [batch, "length"])
        for name in ("input_ids", "attention_mask")
    ]
    graph = helper.make_graph(
        nodes,
        "rows",
        feeds,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString())


@pytest.mark.parametrize("name", MIXED)
def test_an_output_that_sees_other_rows_is_found(name):
    assert mixing(session(model(*MIXED[name])), INPUTS, None, None) == ("y",)


@pytest.mark.parametrize("name", APART)
def test_an_output_of_one_row_is_left_alone(name):
    assert mixing(session(model(*APART[name])), INPUTS, None, None) == ()


@pytest.mark.parametrize("name, mixed", [("centred", ("y",)), ("pooled", ())])
def test_a_static_batch_is_tried_with_other_rows(name, mixed):
    steps, shape = (MIXED | APART)[name]
    shape = [4 if size == "batch" else size for size in shape]
    assert mixing(session(model(steps, shape, batch=4)), INPUTS, 4, None) == mixed


def test_rows_that_outputs_mix_are_one_pass():
    ends = np.full(40, 16)
    assert passes(ends, 16, 8, None, together=True) == [(0, 40)]
    assert len(passes(ends, 16, 8, None)) == 5
    assert passes(ends, 16, 8, 40, together=True) == [(0, 40)]
    with pytest.raises(InputError, match="40 rows, this bundle takes exactly 8: its outputs"):
        passes(ends, 16, 8, 8, together=True)


@pytest.mark.parametrize(
    "name", ["mean", *(pytest.param(n, marks=pytest.mark.slow) for n in ("centred", "similarity"))]
)
def test_a_batch_of_many_passes_equals_onnxruntime(tmp_path, name):
    compare(tmp_path, *MIXED[name])


def compare(folder, steps: list[str], shape: list[int | str]) -> None:
    """12 × 100 tokens, which are several passes of a bundle, through it and ONNX Runtime."""
    path = folder / "model.onnx"
    onnx.save(model(steps, shape), path)
    bertile.compile(str(path), folder / "out", bertile.Config(cache_dir=str(folder / "c")))
    random = np.random.default_rng(1)
    ids = random.integers(0, 50, (12, 100))
    mask = (np.arange(100) < random.integers(1, 101, (12, 1))).astype("int64")
    feed = {"input_ids": ids, "attention_mask": mask}
    with bertile.load(folder / "out") as compiled:
        got = compiled(**{name: feed[name] for name in compiled.inputs})["y"]
    (want,) = session(model(steps, shape)).run(None, feed)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("name", PADDED)
def test_an_output_that_sees_padding_is_found(name):
    assert padded(session(model(*PADDED[name])), INPUTS, None, None) == ("y",)


@pytest.mark.parametrize("name", MASKED)
def test_an_output_that_masks_padding_is_left_alone(name):
    assert padded(session(model(*MASKED[name])), INPUTS, None, None) == ()


@pytest.mark.parametrize(
    "name",
    [
        "mean of all",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("by the length", "largest")),
    ],
)
def test_padding_that_outputs_see_is_computed(tmp_path, name):
    compare(tmp_path, *PADDED[name])


def test_padding_of_an_output_with_the_length_first_is_zero():
    piece, ends = np.ones((5, 3, 2), "float32"), np.array([5, 1, 2])
    got = cut(["length", "batch", 2], [piece[:, :2], piece[:, 2:]], 5, ends)
    np.testing.assert_array_equal(got[..., 0].T, np.arange(5) < ends[:, None])


def test_flattened_tokens_are_refused_by_name(tmp_path):
    proto = model([], ["tokens", 8])
    nodes = [node for node in proto.graph.node if node.output[0] != "y"]
    del proto.graph.node[:]
    shape = onnx.numpy_helper.from_array(np.array([-1, 8]), "flat")
    proto.graph.initializer.append(shape)
    proto.graph.node.extend([*nodes, helper.make_node("Reshape", ["masked", "flat"], ["y"])])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"output 'y' has the shape \('y_0', 8\)"):
        bertile.compile(
            str(path),
            tmp_path / "out",
            bertile.Config(cache_dir=str(tmp_path / "c"), runtime="none"),
        )
