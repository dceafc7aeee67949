"""Makes every floating-point number of a graph float32: weights, casts, and what is computed."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import Probes

NAMES = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
}
_DTYPES = tuple(NAMES.values())
# Numbers of GELU, which are meant where a file holds them rounded.
_MEANT = (math.sqrt(2), math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715)


def to_float32(graph: OnnxGraph) -> tuple[str, ...]:
    """Rewrite the graph in place; return the names of the other types that it held."""
    held: dict[str, None] = {}
    for name in graph.constants():
        if graph.dtype(name) in _DTYPES:
            held[graph.dtype(name)] = None
            graph.set_constant(name, _exact(graph.array(name)))
    for node in graph.nodes:
        for attribute in node.attribute:
            _convert(attribute, held)
    for value in graph.results:
        kind = value.type.tensor_type
        if kind.elem_type in NAMES:
            held[NAMES[kind.elem_type]] = None
            kind.elem_type = onnx.TensorProto.FLOAT
    return tuple(held)


def note(original: onnx.ModelProto, held: tuple[str, ...]) -> tuple[str, ...]:
    """What a person is told of a model that held other types."""
    if not held:
        return ()
    results = original.graph.output
    outputs = [value.name for value in results if value.type.tensor_type.elem_type in NAMES]
    also = f", the outputs too: {', '.join(outputs)}" if outputs else ""
    return (f"{' and '.join(held)} became float32{also}",)


def drop_casts(graph: OnnxGraph, probes: Probes) -> None:
    """Cast(x) → x, where x has the type already."""
    for node in [node for node in graph.nodes if node.op_type == "Cast"]:
        values = probes.of(node.input[0])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(attributes(node)["to"])
        if values is not None and values[0].dtype == dtype:
            graph.replace(node.output[0], node.input[0])
    graph.clean()


def _exact(array: np.ndarray) -> np.ndarray:
    """The same in float32; a single number that is one of `_MEANT`, rounded, becomes that."""
    if array.size == 1:
        for meant in _MEANT:
            if array.reshape(()) == np.asarray(meant).astype(array.dtype):
                return np.full(array.shape, meant, np.float32)
    return array.astype(np.float32)


def _convert(attribute: onnx.AttributeProto, held: dict[str, None]) -> None:
    """A type that an operator makes, or a tensor that it holds."""
    if attribute.name in ("to", "dtype") and attribute.i in NAMES:
        held[NAMES[attribute.i]] = None
        attribute.i = onnx.TensorProto.FLOAT
    if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in NAMES:
        held[NAMES[attribute.t.data_type]] = None
        array = _exact(numpy_helper.to_array(attribute.t))
        attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
