"""Numbers that shapes decide, where they are read by an operator that broadcasts nothing."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from bertile.onnx import counts
from bertile.onnx.exported import InputSpec
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import probe
from bertile.onnx.samples import session
from bertile.onnx.shapes import Axes

INPUTS = (InputSpec("input_ids", below=100),)


def pairs():
    """GatherND(input_ids, the row and the place of each token), as an exporter indexes."""

    def node(op, inputs, output, **attributes):
        return helper.make_node(op, inputs, [output], **attributes)

    def constant(name, value):
        return helper.make_tensor(name, TensorProto.INT64, np.shape(value), np.ravel(value))

    nodes = [
        node("Shape", ["input_ids"], "batch", start=0, end=1),
        node("Shape", ["input_ids"], "length", start=1, end=2),
        node("Squeeze", ["batch"], "rows"),
        node("Squeeze", ["length"], "places"),
        node("Range", ["zero", "rows", "unit"], "row"),
        node("Range", ["zero", "places", "unit"], "place"),
        node("Concat", ["batch", "length", "one"], "whole", axis=0),
        node("Unsqueeze", ["row", "behind"], "down"),
        node("Unsqueeze", ["place", "around"], "across"),
        node("Expand", ["down", "whole"], "every_row"),
        node("Expand", ["across", "whole"], "every_place"),
        node("Concat", ["every_row", "every_place"], "index", axis=-1),
        node("GatherND", ["input_ids", "index"], "again"),
        node("Cast", ["again"], "y", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "pairs",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s"])],
        [
            *(constant("zero", 0), constant("unit", 1), constant("one", [1])),
            *(constant("behind", [1, 2]), constant("around", [0, 2])),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_a_concat_joins_has_its_whole_size():
    graph = OnnxGraph(pairs())
    probes = probe(graph, INPUTS, 20, None, None)
    counts.write_counts(graph, probes, Axes(graph, probes))
    assert not {"Range", "Shape"} & {node.op_type for node in graph.nodes}
    runner = session(graph.to_model(20).SerializeToString())
    for batch, length in ((1, 1), (3, 7), (1, 4)):
        ids = np.arange(batch * length).reshape(batch, length)
        np.testing.assert_array_equal(runner.run(None, {"input_ids": ids})[0], ids)
