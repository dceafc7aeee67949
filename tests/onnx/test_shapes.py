"""Sizes that are made of the batch and the length: what they are, and that TVM knows them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tvm import relax

from bertile.graph.importer import _from_onnx
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import SHAPES, Probes
from bertile.onnx.samples import session
from bertile.onnx.shapes import Axes

OPSET = 20
SIZES = {
    "4 batch": lambda batch, length: 4 * batch,
    "length + 5": lambda batch, length: length + 5,
    "3 length + 2": lambda batch, length: 3 * length + 2,
    "batch length": lambda batch, length: batch * length,
    "2 batch length + 3": lambda batch, length: 2 * batch * length + 3,
}


def written(size) -> onnx.ModelProto:
    """A model whose output has the shape (7, size) of a request's batch and length."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    result = helper.make_tensor_value_info("ones", TensorProto.FLOAT, None)
    unit = helper.make_tensor("unit", TensorProto.FLOAT, [1, 1], [1.0])
    graph = OnnxGraph(helper.make_model(helper.make_graph([], "sizes", [ids], [result], [unit])))
    feeds = tuple({"input_ids": np.zeros(shape, np.int64)} for shape in SHAPES)
    axes = Axes(graph, Probes(feeds, feeds))
    vector = axes.expression(tuple(size(*shape) for shape in SHAPES))
    shape = graph.add("Concat", [graph.integers(7), vector], axis=0)
    expanded = graph.add("Expand", ["unit", shape])
    graph.nodes.append(helper.make_node("Identity", [expanded], ["ones"]))
    graph.clean()
    return graph.to_model(OPSET)


def shapes_of(model):
    runner = session(model.SerializeToString())
    for batch, length in ((1, 1), (3, 6), (2, 17)):
        ids = np.zeros((batch, length), np.int64)
        yield (batch, length), runner.run(None, {"input_ids": ids})[0].shape


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes_of_any_request_are_right_and_known_to_tvm(size):
    model = written(size)
    for request, shape in shapes_of(model):
        assert shape == (7, size(*request))
    mod, _ = _from_onnx(model)
    batch, length = (extent.name for extent in mod["main"].params[0].ty.shape)
    bound = relax.transform.BindSymbolicVars({batch: 3, length: 5})(mod)
    assert [int(extent) for extent in bound["main"].ret_ty.shape] == [7, size(3, 5)]


def test_a_size_that_shrinks_stays_arithmetic():
    def size(batch, length):
        return 100 - 2 * length

    model = written(size)
    assert {"Mul", "Add"} <= {node.op_type for node in model.graph.node}
    for request, shape in shapes_of(model):
        assert shape == (7, size(*request))
