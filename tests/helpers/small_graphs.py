"""Builds small ONNX graphs with layers in integers, and says what is lifted out of them."""

import numpy as np
from helpers.bytes_here import sums_are_exact
from onnx import TensorProto, helper, numpy_helper

from bertile.onnx.graph import OnnxGraph
from bertile.onnx.quantized import lift_quantization
from bertile.onnx.samples import session

OPSET = 17

RANDOM = np.random.default_rng(7)

U8, S8 = np.uint8, np.int8


def integers(dtype, *shape):
    """Random integers; signed bytes of seven bits where the reference would be wrong with eight."""
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -127), limits.max
    if dtype == S8 and not sums_are_exact():
        low, high = -64, 63
    return RANDOM.integers(low, high, shape, endpoint=True).astype(dtype)


def graph_of(nodes, opset=OPSET, shape=("rows", 6), **arrays):
    """An OnnxGraph of x (rows, 6) → y; `nodes` are (operator, inputs, outputs, attributes)."""
    onnx_nodes = []
    for op, read, written, *attributes in nodes:
        named = attributes[0] if attributes else {}
        onnx_nodes.append(
            helper.make_node(
                op, read.split(), written.split(), name=f"{op}_{written.split()[0]}", **named
            )
        )
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(
        onnx_nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        tensors,
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return OnnxGraph(helper.make_model(graph, opset_imports=domains, ir_version=10))


def model_of(graph):
    model = graph.to_model(OPSET)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def lifted(graph, tolerance=1e-5):
    """The graph lifted, checked against what it computed; and its notes."""
    x = RANDOM.standard_normal((5, 6)).astype(np.float32)
    want = run(model_of(graph), x)
    notes = lift_quantization(graph)
    np.testing.assert_allclose(run(graph.to_model(OPSET), x), want, rtol=1e-5, atol=tolerance)
    return graph, notes


def run(model, x):
    return session(model.SerializeToString(), optimize=False).run(["y"], {"x": x})[0]


def operators(graph):
    return sorted(node.op_type for node in graph.nodes)


STEP = {"s": np.float32(0.02), "z": U8(120)}

WEIGHT = {"w": integers(S8, 6, 4), "ws": np.float32(0.01), "wz": S8(0)}

QUANTIZE = ("QuantizeLinear", "x s z", "q")
