"""Operators on integers become operators on floats: before and after in ONNX Runtime."""

import numpy as np
import pytest
from helpers import small_graphs as small
from onnx import TensorProto

from bertile.base.errors import ModelError
from bertile.onnx.quantized import lift_quantization

graph_of, lifted, operators, run = small.graph_of, small.lifted, small.operators, small.run
integers, model_of, OPSET, RANDOM = small.integers, small.model_of, small.OPSET, small.RANDOM
STEP, WEIGHT, QUANTIZE, U8, S8 = small.STEP, small.WEIGHT, small.QUANTIZE, small.U8, small.S8

INTEGER_PRODUCT = [
    ("MatMulInteger", "q w z wz", "m"),
    ("Cast", "m", "c", {"to": TensorProto.FLOAT}),
]
DYNAMIC = ("DynamicQuantizeLinear", "x", "q s z")
SCALED = {
    "both scales at once": [("Mul", "s ws", "both"), ("Mul", "c both", "y")],
    "one after the other": [("Mul", "c s", "half"), ("Mul", "half ws", "y")],
    "the weight's first": [("Mul", "ws c", "half"), ("Mul", "s half", "y")],
}


@pytest.mark.parametrize("form", SCALED)
def test_dynamic_product_of_integers_becomes_one_of_floats(form):
    weight = {**WEIGHT, "ws": np.asarray([0.01, 0.02, 0.03, 0.04], np.float32)}
    graph, notes = lifted(graph_of([DYNAMIC, *INTEGER_PRODUCT, *SCALED[form]], **weight))
    assert operators(graph) == ["DequantizeLinear", "DynamicQuantizeLinear", "MatMul"]
    assert "as they come" in notes[0]


def test_sparseml_product_with_its_bias_in_integers():
    """As its QAT conversion writes it, for DeepSparse: the range is fixed, the bias int32."""
    bias = np.asarray([5, -300, 40, 9000], np.int32)
    both = STEP["s"] * WEIGHT["ws"]
    nodes = [QUANTIZE, INTEGER_PRODUCT[0], ("Add", "m bias", "a")]
    nodes += [("Cast", "a", "c", {"to": TensorProto.FLOAT}), ("Mul", "c both", "y")]
    graph, notes = lifted(graph_of(nodes, **STEP, w=WEIGHT["w"], wz=S8(0), bias=bias, both=both))
    assert operators(graph) == ["Add", "DequantizeLinear", "MatMul", "QuantizeLinear"]
    weight = next(node for node in graph.nodes if node.op_type == "MatMul").input[1]
    np.testing.assert_allclose(graph.array(weight), WEIGHT["w"] * WEIGHT["ws"], rtol=1e-6)
    assert "fixed range" in notes[0]


def test_product_that_is_never_scaled_is_refused_by_name():
    nodes = [DYNAMIC, *INTEGER_PRODUCT, ("Sqrt", "c", "y")]
    with pytest.raises(ModelError, match="MatMulInteger_m"):
        lift_quantization(graph_of(nodes, **WEIGHT))


def test_product_of_two_activations_is_computed_in_floats():
    nodes = [
        DYNAMIC,
        ("Transpose", "q", "t", {"perm": [1, 0]}),
        ("MatMulInteger", "q t z z", "m"),
        ("Cast", "m", "c", {"to": TensorProto.FLOAT}),
        ("Mul", "s s", "both"),
        ("Mul", "c both", "y"),
    ]
    graph, notes = lifted(graph_of(nodes), tolerance=0.1)
    assert operators(graph) == ["MatMul", "Transpose"]
    assert "computed in float32" in notes[0]


def test_operators_on_integers_become_operators_on_floats():
    """QGemm with a transposed weight, a bias and a result in floats."""
    nodes = [QUANTIZE, ("QGemm", "q s z w ws wz b", "y", {"transB": 1, "domain": "com.microsoft"})]
    arrays = {
        "w": integers(S8, 4, 6),
        "ws": np.asarray([0.01, 0.02, 0.03, 0.04], np.float32),
        "wz": np.zeros(4, S8),
        "b": np.asarray([7, -900, 12, 0], np.int32),
    }
    graph, notes = lifted(graph_of(nodes, **STEP, **arrays))
    assert operators(graph) == ["DequantizeLinear", "Gemm", "QuantizeLinear"]
    assert "fixed range" in notes[0]


FUSED = {
    "DynamicQuantizeMatMul": [("DynamicQuantizeMatMul", "x w ws wz b", "y")],
    "MatMulIntegerToFloat": [DYNAMIC, ("MatMulIntegerToFloat", "q w s ws z wz b", "y")],
}


@pytest.mark.parametrize("form", FUSED)
def test_products_that_onnx_runtime_fused_become_plain(form):
    nodes = [
        (*node, {"domain": "com.microsoft"} if "MatMul" in node[0] else {}) for node in FUSED[form]
    ]
    bias = RANDOM.standard_normal(4).astype(np.float32)
    graph, notes = lifted(graph_of(nodes, **WEIGHT, b=bias))
    assert operators(graph) == ["Add", "DequantizeLinear", "DynamicQuantizeLinear", "MatMul"]
    assert "as they come" in notes[0]


def test_other_integer_operators_leave_nothing_but_floats():
    nodes = [
        QUANTIZE,
        ("QLinearAdd", "q s z q s z t u", "sum", {"domain": "com.microsoft"}),
        ("QLinearMul", "sum t u q s z t u", "product", {"domain": "com.microsoft"}),
        ("QLinearSoftmax", "product t u v u", "soft", {"domain": "com.microsoft", "opset": 13}),
        ("DequantizeLinear", "soft v u", "y"),
    ]
    arrays = {"t": np.float32(0.04), "u": U8(0), "v": np.float32(1 / 256)}
    graph = graph_of(nodes, **STEP, **arrays)
    x = np.abs(RANDOM.standard_normal((5, 6)).astype(np.float32))
    want = run(model_of(graph), x)
    notes = lift_quantization(graph)
    assert set(operators(graph)) == {"Add", "Mul", "Softmax", "Relu"}
    np.testing.assert_allclose(run(graph.to_model(OPSET), x), want, atol=0.05)
    assert "computed in float32" in notes[-1]
