"""One spelling for lookups, however torch's exporter writes an index."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bertile.onnx import rewrites
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.samples import session

X = np.arange(2 * 3 * 4, dtype="float32").reshape(2, 3, 4)
INDEX = np.array([[1, 0, 1], [0, 1, 1]])


def model(nodes, rank=4):
    """A model of x (2, 3, 4) and index (2, 3) with the one output y."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape),
        helper.make_tensor_value_info("index", TensorProto.INT64, INDEX.shape),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    last = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
    graph = helper.make_graph(nodes, "small", inputs, [y], [last])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], **attributes)


def between(first, last):
    """x gathered between two transposes, as x[:, :, index] is exported."""
    return [
        node("Unsqueeze", ["index", "last"], "pairs"),
        node("Transpose", ["x"], "front", perm=first),
        node("GatherND", ["front", "pairs"], "rows"),
        node("Transpose", ["rows"], "y", perm=last),
    ]


def rewritten(nodes):
    """The operators that are left, and that they still give the same."""
    before = model(nodes)
    graph = OnnxGraph(before)
    rewrites.write_gathers(graph)
    after = graph.to_model(20)
    onnx.checker.check_model(after)
    feed = {"x": X, "index": INDEX}
    want, got = (session(m.SerializeToString()).run(None, feed)[0] for m in (before, after))
    np.testing.assert_array_equal(got, want)
    return [(n.op_type, [a.i for a in n.attribute if a.name == "axis"]) for n in graph.nodes]


def test_a_lookup_of_rows_is_a_gather():
    nodes = [node("Unsqueeze", ["index", "last"], "pairs"), node("GatherND", ["x", "pairs"], "y")]
    assert rewritten(nodes) == [("Gather", [0])]


@pytest.mark.parametrize(
    ("first", "last", "axis"),
    [([2, 0, 1], [2, 3, 0, 1], 2), ([1, 0, 2], [2, 0, 1, 3], 1), ([0, 1, 2], [0, 1, 2, 3], 0)],
)
def test_a_lookup_between_transposes_is_a_gather_on_their_axis(first, last, axis):
    assert rewritten(between(first, last)) == [("Gather", [axis])]


@pytest.mark.parametrize(
    ("first", "last"), [([2, 1, 0], [2, 3, 0, 1]), ([2, 0, 1], [3, 2, 0, 1])], ids=str
)
def test_what_is_moved_otherwise_stays_between_its_transposes(first, last):
    left = rewritten(between(first, last))
    assert left == [("Transpose", []), ("Gather", [0]), ("Transpose", [])]


def test_a_lookup_by_pairs_is_left_alone():
    nodes = [
        node("Unsqueeze", ["index", "last"], "one"),
        node("Concat", ["one", "one"], "pairs", axis=-1),
        node("GatherND", ["x", "pairs"], "y"),
    ]
    left = [op for op, _ in rewritten_rank3(nodes)]
    assert "GatherND" in left and "Gather" not in left


def rewritten_rank3(nodes):
    graph = OnnxGraph(model(nodes, rank=3))
    rewrites.write_gathers(graph)
    return [(n.op_type, []) for n in graph.nodes]


def picked(axis, place):
    """What is left of one part of a stack of x (2, 3, 4) and twice it, and that it is the same."""
    nodes = [
        node("Add", ["x", "x"], "twice"),
        node("Unsqueeze", ["x", "last"], "first"),
        node("Unsqueeze", ["twice", "last"], "second"),
        node("Concat", ["first", "second"], "stack", axis=axis),
        node("Gather", ["stack", "place"], "part", axis=3),
        node("Identity", ["part"], "y"),
    ]
    before = model(nodes, rank=3)
    before.graph.initializer.append(helper.make_tensor("place", TensorProto.INT64, [], [place]))
    graph = OnnxGraph(before)
    rewrites.pick_from_stacks(graph, lambda name: [2, 3, 4])
    graph.clean()
    feed = {"x": X, "index": INDEX}
    after = session(graph.to_model(20).SerializeToString()).run(None, feed)[0]
    np.testing.assert_array_equal(after, (1 + place % 2) * X)
    return [n.op_type for n in graph.nodes]


@pytest.mark.parametrize(("axis", "place"), [(-1, 1), (3, 1), (-1, -1)])
def test_a_part_of_a_stack_is_what_was_stacked(axis, place):
    assert "Concat" not in picked(axis, place)


def test_a_part_of_another_joint_stays():
    shape = [2, 3, 8]
    nodes = [
        node("Concat", ["x", "x"], "both", axis=2),
        node("Gather", ["both", "last"], "part", axis=2),
        node("Identity", ["part"], "y"),
    ]
    graph = OnnxGraph(model(nodes, rank=3))
    rewrites.pick_from_stacks(graph, lambda name: shape)
    assert [n.op_type for n in graph.nodes if n.op_type != "Identity"] == ["Concat", "Gather"]
