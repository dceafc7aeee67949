"""An If that no request decides loses its branches; one that values decide keeps them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from bertile.onnx import branches
from bertile.onnx.samples import run_onnx

IDS = np.arange(6).reshape(2, 3)


def branch(name, operator):
    """A branch that reads a tensor around it."""
    node = helper.make_node(operator, ["ids"], [f"{name}.out"])
    result = helper.make_tensor_value_info(f"{name}.out", TensorProto.INT64, None)
    return helper.make_graph([node], name, [], [result])


def model(compared):
    """-ids where the first two of what is compared are equal, |ids| otherwise; twice over."""
    make = helper.make_node
    nodes = [
        *compared,
        make("Gather", ["both", "zero"], ["a"]),
        make("Gather", ["both", "one"], ["b"]),
        make("Equal", ["a", "b"], ["same"]),
    ]
    for source, result in (("same", "y"), ("again", "z")):
        if source == "again":  # a condition behind the first If
            nodes += [
                make("Shape", ["y"], ["y.shape"]),
                make("Gather", ["y.shape", "zero"], ["rows"]),
                make("Less", ["rows", "zero"], ["again"]),
            ]
        options = {"then_branch": branch(f"{result}.then", "Neg")}
        options["else_branch"] = branch(f"{result}.else", "Abs")
        nodes.append(make("If", [source], [result], **options))
    numbers = [
        helper.make_tensor(n, TensorProto.INT64, [], [v]) for n, v in (("zero", 0), ("one", 1))
    ]
    info = helper.make_tensor_value_info
    results = [info(name, TensorProto.INT64, None) for name in "yz"]
    inputs = [info("ids", TensorProto.INT64, ["b", "s"])]
    graph = helper.make_graph(nodes, "g", inputs, results, numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def of_shapes(first, second):
    """Sizes of the ids, side by side."""
    return [
        helper.make_node("Shape", ["ids"], [first], start=0, end=1),
        helper.make_node("Shape", ["ids"], [second], start=0, end=1),
        helper.make_node("Concat", [first, second], ["both"], axis=0),
    ]


def test_branch_that_all_requests_take_is_left_alone():
    before = model(of_shapes("m", "n"))
    after = branches.settle(before)
    assert "If" not in {node.op_type for node in after.graph.node}
    want, got = (run_onnx(m.SerializeToString(), {"ids": IDS}) for m in (before, after))
    assert (got["y"] == want["y"]).all() and (got["z"] == want["z"]).all()
    assert (got["y"] == -IDS).all() and (got["z"] == IDS).all()


def test_branch_for_long_requests_stays():
    nodes = [*of_shapes("m", "n")[:1], helper.make_node("Shape", ["ids"], ["n"], start=1, end=2)]
    nodes += [
        helper.make_node("Max", ["n", "limit"], ["n.or.limit"]),
        helper.make_node("Concat", ["n.or.limit", "limit"], ["both"], axis=0),
    ]
    before = model(nodes)
    before.graph.initializer.append(helper.make_tensor("limit", TensorProto.INT64, [1], [500]))
    after = branches.settle(before)
    assert [node.op_type for node in after.graph.node].count("If") == 2


@pytest.mark.parametrize("values", [True, False])
def test_branch_that_requests_decide_stays(values):
    nodes = [helper.make_node("Reshape", ["ids", "flat"], ["both"])]
    if not values:  # by the batch beside the length
        nodes = [helper.make_node("Shape", ["ids"], ["both"])]
    before = model(nodes)
    if values:
        before.graph.initializer.append(helper.make_tensor("flat", TensorProto.INT64, [1], [-1]))
    after = branches.settle(before)
    assert [node.op_type for node in after.graph.node].count("If") == 2
