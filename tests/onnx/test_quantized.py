"""Quantization of small graphs, lifted, and what they compute before and after in ONNX Runtime."""

import numpy as np
import pytest
from helpers.small_graphs import (
    OPSET,
    QUANTIZE,
    RANDOM,
    S8,
    STEP,
    U8,
    WEIGHT,
    graph_of,
    integers,
    lifted,
    model_of,
    operators,
    run,
)
from onnx import TensorProto

from bertile.onnx.quantized import drop_marks, lift_quantization


def test_linear_layer_keeps_one_pair_and_floats():
    graph, notes = lifted(
        graph_of(
            [
                QUANTIZE,
                ("DequantizeLinear", "q s z", "d"),
                ("DequantizeLinear", "w ws wz", "f"),
                ("MatMul", "d f", "y"),
            ],
            **STEP,
            **WEIGHT,
        )
    )
    assert operators(graph) == ["DequantizeLinear", "MatMul", "QuantizeLinear"]
    weight = next(node for node in graph.nodes if node.op_type == "MatMul").input[1]
    assert np.array_equal(graph.array(weight), WEIGHT["w"] * WEIGHT["ws"])
    assert notes == ("quantized: 1 linear layers have int8 weights and inputs of a fixed range",)
    plain = drop_marks(graph.to_model(OPSET))
    assert {node.op_type for node in plain.graph.node} == {"Identity", "MatMul"}


def test_weight_in_floats_is_rounded_and_transposed_as_in_training():
    """torch's and SparseML's form: QuantizeLinear → DequantizeLinear → Transpose → MatMul."""
    floats = RANDOM.standard_normal((4, 6)).astype(np.float32) / 2
    graph = graph_of(
        [
            ("QuantizeLinear", "floats ws wz", "w", {"axis": 0}),
            ("DequantizeLinear", "w ws wz", "f", {"axis": 0}),
            ("Transpose", "f", "t", {"perm": [1, 0]}),
            QUANTIZE,
            ("DequantizeLinear", "q s z", "d"),
            ("MatMul", "d t", "y"),
        ],
        floats=floats,
        ws=np.asarray([0.01, 0.02, 0.005, 0.03], np.float32),
        wz=np.zeros(4, S8),
        **STEP,
    )
    graph, notes = lifted(graph)
    assert operators(graph).count("DequantizeLinear") == 1
    assert "fixed range" in notes[0]


def test_table_of_integers_is_looked_up_in_floats():
    nodes = [
        ("Cast", "x", "ids", {"to": TensorProto.INT64}),
        ("Gather", "table ids", "rows"),
        ("DequantizeLinear", "rows ts tz", "y"),
    ]
    graph = graph_of(nodes, table=integers(U8, 9, 3), ts=np.float32(0.1), tz=U8(99))
    x = RANDOM.integers(0, 9, (5, 6)).astype(np.float32)
    want = run(model_of(graph), x)
    lift_quantization(graph)
    assert operators(graph) == ["Cast", "Gather"]
    assert np.array_equal(run(graph.to_model(OPSET), x), want)


def test_mark_moves_behind_what_moves_elements():
    """NNCF quantizes before Transpose and Reshape what a product reads behind them."""
    nodes = [
        QUANTIZE,
        ("DequantizeLinear", "q s z", "d"),
        ("Reshape", "d halves", "r"),
        ("Transpose", "r", "t", {"perm": [1, 0, 2]}),
        ("Reshape", "t whole", "back"),
        ("DequantizeLinear", "w ws wz", "f"),
        ("MatMul", "back f", "y"),
    ]
    shapes = {"halves": np.asarray([-1, 2, 3]), "whole": np.asarray([-1, 6])}
    graph, _ = lifted(graph_of(nodes, **STEP, **WEIGHT, **shapes))
    product = next(node for node in graph.nodes if node.op_type == "MatMul")
    assert graph.producers()[product.input[0]].op_type == "DequantizeLinear"
    assert operators(graph).count("DequantizeLinear") == 1


def test_range_from_zero_stands_for_a_relu():
    """ONNX Runtime leaves out a Relu whose result is quantized from zero."""
    nodes = [
        QUANTIZE,
        ("DequantizeLinear", "q s z", "d"),
        ("DequantizeLinear", "w ws wz", "f"),
        ("MatMul", "d f", "y"),
    ]
    graph, _ = lifted(graph_of(nodes, s=np.float32(0.02), z=U8(0), **WEIGHT))
    assert "Relu" in operators(graph)
    x = RANDOM.standard_normal((5, 6)).astype(np.float32)
    plain = run(drop_marks(graph.to_model(OPSET)), x)
    floats = WEIGHT["w"] * WEIGHT["ws"]
    np.testing.assert_allclose(plain, np.maximum(x, 0) @ floats, rtol=1e-5, atol=1e-5)


def test_layers_of_one_input_share_a_mark_that_holds_all_their_ranges():
    nodes = [
        QUANTIZE,
        ("DequantizeLinear", "q s z", "d"),
        ("QuantizeLinear", "x s2 z2", "q2"),
        ("DequantizeLinear", "q2 s2 z2", "d2"),
        ("DequantizeLinear", "w ws wz", "f"),
        ("MatMul", "d f", "first"),
        ("MatMul", "d2 f", "second"),
        ("Add", "first second", "y"),
    ]
    graph = graph_of(nodes, **STEP, **WEIGHT, s2=np.float32(0.03), z2=S8(0))
    notes = lift_quantization(graph)
    assert operators(graph).count("QuantizeLinear") == 1
    (pair,) = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    scale, zero = (graph.array(name) for name in pair.input[1:])
    low, high = min(-2.4, -128 * 0.03), max(2.7, 127 * 0.03)
    assert -float(zero) * scale == pytest.approx(low, abs=float(scale))
    assert scale == pytest.approx((high - low) / 255)
    assert any("widest" in note for note in notes)


def test_activations_of_16_bits_are_left_in_floats():
    nodes = [
        ("QuantizeLinear", "x s z", "q", {"domain": "com.microsoft"}),
        ("DequantizeLinear", "q s z", "d", {"domain": "com.microsoft"}),
        ("DequantizeLinear", "w ws wz", "f"),
        ("MatMul", "d f", "y"),
    ]
    graph = graph_of(nodes, s=np.float32(1e-4), z=np.uint16(32768), **WEIGHT)
    notes = lift_quantization(graph)
    assert operators(graph) == ["MatMul"]
    assert notes == (
        "quantized: 1 other activations that the file quantizes are computed in float32",
    )


def test_layer_with_weights_in_floats_gets_no_mark():
    nodes = [QUANTIZE, ("DequantizeLinear", "q s z", "d"), ("MatMul", "d floats", "y")]
    graph = graph_of(nodes, **STEP, floats=RANDOM.standard_normal((6, 4)).astype(np.float32))
    lift_quantization(graph)
    assert operators(graph) == ["MatMul"]


def test_weights_in_blocks_of_an_axis():
    nodes = [
        ("DequantizeLinear", "w ws", "f", {"axis": 0, "block_size": 3}),
        ("MatMul", "x f", "y"),
    ]
    scales = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    graph = graph_of(nodes, opset=21, w=WEIGHT["w"], ws=scales)
    lift_quantization(graph)
    x = RANDOM.standard_normal((5, 6)).astype(np.float32)
    want = x @ (WEIGHT["w"] * np.repeat(scales, 3, axis=0))
    np.testing.assert_allclose(run(graph.to_model(21), x), want, rtol=1e-4)


def test_model_in_floats_is_left_alone():
    graph = graph_of([("MatMul", "x floats", "y")], floats=np.ones((6, 4), np.float32))
    nodes = list(graph.nodes)
    assert lift_quantization(graph) == ()
    assert graph.nodes == nodes
