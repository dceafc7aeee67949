"""Tables that exporters index by copies, by elements or from their end, as TVM can look them up."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bertile.onnx import counts, normalizer, rewrites
from bertile.onnx.exported import InputSpec
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import probe
from bertile.onnx.samples import session
from bertile.onnx.shapes import Axes

OPSET = 20
INPUTS = (InputSpec("input_ids", below=100),)
TABLE = np.random.default_rng(3).standard_normal((1, 64, 6)).astype("float32")
BIASES = np.random.default_rng(4).standard_normal((4, 1, 64)).astype("float32")


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], **attributes)


# Range(length), (1, length)
PLACES = [
    node("Shape", ["input_ids"], "size", start=1, end=2),
    node("Squeeze", ["size"], "length"),
    node("Range", ["zero", "length", "unit"], "range"),
    node("Unsqueeze", ["range", "first"], "places"),
]
# The rows of the places, by an index as wide as the table: GPT-J.
ROWS = [
    *PLACES,
    node("Unsqueeze", ["places", "last"], "narrow"),
    node("Tile", ["narrow", "width"], "wide"),
    node("GatherElements", ["table", "wide"], "rows", axis=1),
]
FORMS = {
    "rows": [*ROWS, node("Identity", ["rows"], "y")],
    # each of their channels twice: CodeGen
    "copies": [
        *ROWS,
        node("Unsqueeze", ["rows", "last"], "one"),
        node("Expand", ["one", "twice"], "two"),
        node("Reshape", ["two", "joined"], "y"),
    ],
    # the same by pairs
    "pairs": [
        *PLACES,
        node("Unsqueeze", ["places", "last"], "narrow"),
        node("GatherND", ["flat", "narrow"], "y"),
    ],
    # the last biases of as many as tokens: MPT
    "tails": [
        node("Shape", ["input_ids"], "size", start=1, end=2),
        node("Mul", ["size", "last"], "less"),
        node("Add", ["less", "number"], "begin"),
        node("Slice", ["biases", "begin", "number", "two_axes", "ones"], "y"),
    ],
}


def model(form):
    constants = {
        **{"zero": 0, "unit": 1, "first": [0], "last": [-1], "width": [1, 1, 6]},
        **{"twice": [1, 1, 1, 2], "joined": [1, -1, 12], "number": [64], "two_axes": [2]},
        **{"ones": [1], "table": TABLE, "flat": TABLE[0], "biases": BIASES},
    }
    held = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 3)
    graph = helper.make_graph(FORMS[form], "tables", [ids], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.mark.parametrize("form", list(FORMS))
def test_a_table_is_looked_up_by_rows(form):
    before = model(form)
    graph = OnnxGraph(before)
    limit, _ = normalizer.brought(graph, INPUTS, OPSET, 64)
    left = {node.op_type for node in graph.nodes}
    assert not left & {"Range", "Tile", "Expand", "GatherElements", "GatherND"}
    assert limit == 64
    runners = [session(m.SerializeToString()) for m in (before, graph.to_model(OPSET))]
    for batch, length in ((1, 1), (3, 7), (2, 64)):
        feed = {"input_ids": np.arange(batch * length).reshape(batch, length)}
        want, got = (runner.run(None, feed)[0] for runner in runners)
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


def test_what_is_cut_from_the_end_of_a_table_limits_the_length():
    graph = OnnxGraph(model("tails"))
    probes = probe(graph, INPUTS, OPSET, None, None)
    assert counts.write_tails(graph, probes, Axes(graph, probes)) == 64
    assert [node.op_type for node in graph.nodes][-1] == "Gather"


@pytest.mark.parametrize("twice", [[1, 1, 1, 2], [4, 1, 1, 1], [4, 1, 1, 2]])
def test_copies_are_joined_where_one_axis_of_one_grows(twice):
    """Where two axes grow, an Expand stays as it is."""
    before = model("copies")
    for constant in before.graph.initializer:
        if constant.name == "twice":
            constant.CopyFrom(numpy_helper.from_array(np.asarray(twice), "twice"))
    graph = OnnxGraph(before)
    sizes = probe(graph, INPUTS, OPSET, None, None).sizes
    rewrites.join_copies(graph, sizes)
    grown = sum(size != 1 for size in twice)
    assert any(node.op_type == "Expand" for node in graph.nodes) == (grown > 1)
