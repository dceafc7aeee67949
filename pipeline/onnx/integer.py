"""Operators on integers become the operator on floats between dequantized inputs and a quantized
output.

    QLinearMatMul(a, b) → y        →  QuantizeLinear(MatMul(DequantizeLinear(a), …(b))) → y
    MatMulInteger(a, b), Cast, Mul →  MatMul(DequantizeLinear(a), DequantizeLinear(b))

The first is ONNX Runtime's QOperator form, the second that of its dynamic quantizer and of
SparseML. Names of operators outside the ONNX standard are those of the domain com.microsoft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx

from bertile.base.errors import ModelError
from bertile.onnx.graph import OnnxGraph, attributes

# Operators that move elements and change none of them; the first input holds the elements.
MOVES = ("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather")

# Operators between floats and integers.
PAIRS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")

# The float operator of one that reads (tensor, scale, zero point) triples and ends in a scale and
# zero point for its result.
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}


def is_quantized(node: onnx.NodeProto) -> bool:
    """Whether a node reads or makes integers that stand for floats."""
    return node.op_type in (*PAIRS, "MatMulInteger", *_EXPANSIONS)


def expand_integers(graph: OnnxGraph) -> None:
    """Leave QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear as the only operators that
    touch 8-bit integers, beside those that move data.

    Raises ModelError, with the node's name, for a product of integers that is never scaled.
    """
    for node in list(graph.nodes):
        expand = _EXPANSIONS.get(node.op_type)
        if expand is not None:
            graph.replace(node.output[0], expand(graph, node))
    for product in [node for node in graph.nodes if node.op_type == "MatMulInteger"]:
        _expand_product(graph, product)
    graph.clean()


def dequantize(graph: OnnxGraph, integers: str, scale: str, zero: str = "", axis: int = 1) -> str:
    """Add a DequantizeLinear and return its result."""
    inputs = [integers, scale, zero] if zero else [integers, scale]
    return graph.add("DequantizeLinear", inputs, axis=axis)


def _triples(graph: OnnxGraph, names: list[str]) -> list[str]:
    groups = [names[start : start + 3] for start in range(0, len(names), 3)]
    return [dequantize(graph, *group) for group in groups]


def _quantized(graph: OnnxGraph, value: str, scale: str, zero: str) -> str:
    return graph.add("QuantizeLinear", [value, scale, zero])


def _of_triples(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """QLinearAdd, QLinearMul and QLinearMatMul: (a, b, scale and zero point of the result)."""
    inputs = _triples(graph, list(node.input[:6]))
    floats = graph.add(_BINARY[node.op_type], inputs)
    return _quantized(graph, floats, *node.input[6:8])


def _of_one(op: str) -> Callable[[OnnxGraph, onnx.NodeProto], str]:
    """(tensor, its scale and zero point, those of the result); attributes that `op` has stay."""

    def expand(graph: OnnxGraph, node: onnx.NodeProto) -> str:
        (value,) = _triples(graph, list(node.input[:3]))
        kept = {key: option for key, option in attributes(node).items() if key in ("axis", "alpha")}
        return _quantized(graph, graph.add(op, [value], **kept), *node.input[3:5])

    return expand


def _concat(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """(scale and zero point of the result, triples)."""
    inputs = _triples(graph, list(node.input[2:]))
    joined = graph.add("Concat", inputs, axis=attributes(node)["axis"])
    return _quantized(graph, joined, *node.input[:2])


def _where(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """(condition, two triples, scale and zero point of the result)."""
    chosen = _triples(graph, list(node.input[1:7]))
    return _quantized(graph, graph.add("Where", [node.input[0], *chosen]), *node.input[7:9])


def _gemm(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """QGemm: two triples, an int32 bias, scale and zero point of the result, where it has them."""
    options = attributes(node)
    names = [*node.input, *[""] * (9 - len(node.input))]
    axis = 0 if options.get("transB") else 1
    x, w = dequantize(graph, *names[:3]), dequantize(graph, *names[3:6], axis=axis)
    inputs = [x, w]
    if names[6]:
        scale = (
            graph.array(names[1]) * graph.array(names[4]) * np.float32(options.get("alpha", 1.0))
        )
        inputs.append(dequantize(graph, names[6], graph.constant(scale), axis=0))
    product = graph.add("Gemm", inputs, **options)
    return _quantized(graph, product, *names[7:9]) if names[7] else product


def _scaled_product(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """MatMulIntegerToFloat: a, b, their scales, their zero points, a bias."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = [*node.input, *[""] * (7 - len(node.input))]
    left = dequantize(graph, a, a_scale, a_zero)
    return _biased(graph, left, dequantize(graph, b, b_scale, b_zero), bias)


def _dynamic_product(graph: OnnxGraph, node: onnx.NodeProto) -> str:
    """DynamicQuantizeMatMul: floats, integers with scale and zero point, a bias."""
    x, b, b_scale, b_zero, bias = [*node.input, *[""] * (5 - len(node.input))]
    names = [graph.fresh(hint) for hint in ("quantized", "scale", "zero")]
    graph.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", [x], names, name=names[0]))
    return _biased(graph, dequantize(graph, *names), dequantize(graph, b, b_scale, b_zero), bias)


def _biased(graph: OnnxGraph, left: str, right: str, bias: str) -> str:
    product = graph.add("MatMul", [left, right])
    return graph.add("Add", [product, bias]) if bias else product


_EXPANSIONS: dict[str, Callable[[OnnxGraph, onnx.NodeProto], str]] = {
    **dict.fromkeys(_BINARY, _of_triples),
    "QLinearSoftmax": _of_one("Softmax"),
    "QLinearSigmoid": _of_one("Sigmoid"),
    "QLinearLeakyRelu": _of_one("LeakyRelu"),
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "QGemm": _gemm,
    "MatMulIntegerToFloat": _scaled_product,
    "DynamicQuantizeMatMul": _dynamic_product,
}


def _expand_product(graph: OnnxGraph, node: onnx.NodeProto) -> None:
    """MatMulInteger, [Add of an int32 bias,] Cast, Mul of the scales, in one factor or several."""
    a, b, a_zero, b_zero = [*node.input, *[""] * (4 - len(node.input))]
    producers = graph.producers()
    a_scale, b_scale = (_own_scale(name, producers) for name in (a, b))
    if not a_scale:
        raise _unscaled(node)
    known = [graph.array(name) for name in (a_scale, b_scale) if graph.is_constant(name)]
    computed = [name for name in (a_scale, b_scale) if name and not graph.is_constant(name)]
    end, bias, factors = _scales(graph, node, computed, bool(known) or not b_scale)
    whole = _product(graph.array(name) for name in factors)
    rest = whole / _product(known)  # what the scales of quantized activations leave of it
    if not b_scale:
        b_scale = graph.constant(rest.astype(np.float32), "scale")
    elif not np.allclose(rest, 1.0, rtol=1e-5):
        raise _unscaled(node)
    inputs = [dequantize(graph, a, a_scale, a_zero), dequantize(graph, b, b_scale, b_zero)]
    product = graph.add("MatMul", inputs)
    if bias:
        value = (graph.array(bias) * whole).astype(np.float32)
        product = graph.add("Add", [product, graph.constant(value, "bias")])
    graph.replace(end, product)


def _product(factors: Iterable[np.ndarray]) -> np.ndarray:
    """A number, or one per column."""
    total = np.ones((), np.float64)
    for factor in factors:
        total = total * (factor.reshape(()) if factor.size == 1 else factor.reshape(-1))
    return total


def _own_scale(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The scale that an activation was quantized with; "" for a constant."""
    node = producers.get(name)
    while node is not None and node.op_type in MOVES:
        node = producers.get(node.input[0])
    if node is not None and node.op_type == "DynamicQuantizeLinear":
        return node.output[1]
    return node.input[1] if node is not None and node.op_type == "QuantizeLinear" else ""


def _scales(
    graph: OnnxGraph, node: onnx.NodeProto, wanted: list[str], constant: bool
) -> tuple[str, str, list[str]]:
    """Follow a product of integers until the scales wanted, and a constant, are multiplied to it.

    Returns the tensor that is then reached, the int32 bias added on the way, and those factors
    that are constants.
    """
    producers, consumers = graph.producers(), graph.consumers()
    last, bias, constants, missing = node.output[0], "", [], list(wanted)
    while missing or (constant and not constants):
        readers = consumers.get(last, [])
        if len(readers) != 1 or readers[0].op_type not in ("Add", "Cast", "Mul"):
            raise _unscaled(node)
        other = next((name for name in readers[0].input if name != last), "")
        if readers[0].op_type == "Add":
            if not graph.is_constant(other) or graph.is_float(other):
                raise _unscaled(node)
            bias = other
        for factor in _factors(other, producers) if readers[0].op_type == "Mul" else ():
            if graph.is_constant(factor):
                constants.append(factor)
            elif factor in missing:
                missing.remove(factor)
            else:
                raise _unscaled(node)
        last = readers[0].output[0]
    return last, bias, constants


def _factors(name: str, producers: dict[str, onnx.NodeProto]) -> Iterator[str]:
    node = producers.get(name)
    if node is None or node.op_type != "Mul":
        yield name
        return
    for operand in node.input:
        yield from _factors(operand, producers)


def _unscaled(node: onnx.NodeProto) -> ModelError:
    return ModelError(
        f"the integers that operator MatMulInteger (node '{node.name or node.output[0]}') computes"
        " are not scaled in a form that is known",
        "quantize the model with ONNX Runtime's quantize_dynamic or quantize_static",
    )
