"""Makes a small ONNX model whose positions are an input."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

VOCABULARY, PLACES = 64, 40


def lookups(ids: str = "input_ids", before: tuple = (), **inputs: int) -> onnx.ModelProto:
    """The sum of an embedding by ids and one by places, (batch, length, 8), and a LayerNorm.

    ``inputs`` are the types of what the graph takes; ``before`` are nodes that make ``ids``.
    """
    random = np.random.default_rng(3)
    arrays = {
        "words": random.standard_normal((VOCABULARY, 8)).astype("float32"),
        "places": random.standard_normal((PLACES, 8)).astype("float32"),
        "scale": random.standard_normal(8).astype("float32"),
        "shift": random.standard_normal(8).astype("float32"),
        "minus": np.array(-3),
        "flat": np.array([-1]),
        "lowest": np.array(0),
        "highest": np.array(VOCABULARY - 10),
    }
    nodes = [
        *before,
        helper.make_node("Gather", ["words", ids], ["x"]),
        helper.make_node("Gather", ["places", "position_ids"], ["p"]),
        helper.make_node("Add", ["x", "p"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["last_hidden_state"]),
    ]
    tokens = ["batch", "length"]
    graph = helper.make_graph(
        nodes,
        "lookups",
        [helper.make_tensor_value_info(name, kind, tokens) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
