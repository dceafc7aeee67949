"""Operators of ONNX Runtime's domain written in plain ones, against ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bertile.base.errors import ModelError
from bertile.onnx import microsoft
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.samples import session

RANDOM = np.random.default_rng(5)
HIDDEN, HEADS, IDS = 12, 2, 20
OPSET = 17


def floats(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(nodes, outputs=("y",), opset=OPSET, **arrays):
    """A model of input_ids and attention_mask (batch, length), whose rows `x` are looked up."""
    arrays = {"words": floats(IDS, HIDDEN), **arrays}
    plain = [helper.make_node("Gather", ["words", "input_ids"], ["x"])]
    for number, (op, read, written, *options) in enumerate(nodes):
        named = {"domain": "com.microsoft", **(options[0] if options else {})}
        read = [name if name != "-" else "" for name in read.split()]
        plain.append(helper.make_node(op, read, written.split(), f"n{number}", **named))
    ints = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    graph = helper.make_graph(
        plain,
        "small",
        ints,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def feeds():
    """Full rows, one token, and rows padded on the right."""
    for seed, (batch, length) in enumerate(((1, 1), (2, 5), (3, 9))):
        random = np.random.default_rng(seed)
        real = random.integers(1, length + 1, batch)
        real[0] = length
        mask = (np.arange(length) < real[:, None]).astype(np.int64)
        yield {"input_ids": random.integers(0, IDS, (batch, length)), "attention_mask": mask}


def assert_equal(proto, tolerance=2e-5):
    """What plain operators compute is what ONNX Runtime does; no operator of the domain is left."""
    graph = OnnxGraph(proto)
    opset = microsoft.expand(graph, OPSET, None, None)
    assert {node.domain for node in graph.nodes} == {""}
    assert not any(node.op_type in microsoft.UNNAMED for node in graph.nodes)
    before = session(proto.SerializeToString(), optimize=False)
    after = session(graph.to_model(opset).SerializeToString(), optimize=False)
    inputs = {value.name for value in after.get_inputs()}
    for feed in feeds():
        read = {name: value for name, value in feed.items() if name in inputs}
        known = {value.name for value in before.get_inputs()}
        want = before.run(None, {name: value for name, value in feed.items() if name in known})
        real = feed["attention_mask"] == 1
        for expected, got in zip(want, after.run(None, read), strict=True):
            if expected.shape[:2] == real.shape:
                expected, got = expected[real], got[real]
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


W, B = floats(HIDDEN, 3 * HIDDEN), floats(3 * HIDDEN)
MASK = ("Cast", "attention_mask", "mask", {"to": TensorProto.INT32, "domain": ""})
COUNT = ("ReduceSum", "mask unit_axis", "count", {"keepdims": 0, "domain": ""})
ONE = np.asarray([1])
SHARED = {"q": floats(HIDDEN, HIDDEN), "k": floats(HIDDEN, HIDDEN), "v": floats(HIDDEN, HIDDEN)}
PARTS = tuple(("MatMul", f"x {name}", f"{name}x", {"domain": ""}) for name in "qkv")
FLAT = {"w": floats(7, HIDDEN), "rows": np.asarray([-1, HIDDEN])}
GAMMA = {"gamma": floats(HIDDEN), "beta": floats(HIDDEN), "bias": floats(HIDDEN)}


@pytest.mark.parametrize(
    ("node", "arrays"),
    [
        (("Gelu", "x", "y"), {}),
        (("BiasGelu", "x bias", "y"), GAMMA),
        (("FastGelu", "x", "y"), {}),
        (("FastGelu", "x bias", "y"), GAMMA),
        (("QuickGelu", "x", "y"), {}),
        (("QuickGelu", "x", "y", {"alpha": 1.0}), {}),
        (("SimplifiedLayerNormalization", "x gamma", "y", {"domain": "", "epsilon": 1e-3}), GAMMA),
        (("FusedMatMul", "x w", "y", {"transB": 1, "alpha": 0.5}), {"w": floats(7, HIDDEN)}),
        (("FusedMatMul", "x x", "y", {"transA": 1}), {}),
        (("FusedGemm", "flat w", "y", {"transB": 1, "alpha": 0.5, "activation": "Tanh"}), FLAT),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_operator_of_one_tensor(node, arrays):
    read = {name: value for name, value in arrays.items() if name in (*node[1].split(), "rows")}
    before = [("Reshape", "x rows", "flat", {"domain": ""})] if "rows" in read else []
    assert_equal(model([*before, node], **read))


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_of_sums_give_the_sum_too(op, bias):
    beta = " beta" if op == "SkipLayerNormalization" else ""
    nodes = [
        ("BiasGelu", "x bias", "skip"),
        (op, f"x skip gamma{beta}{' bias' * bias}", "y - - total".replace("- -", "m s")),
    ]
    nodes = [nodes[0], (*nodes[1][:2], "y m s total")]
    proto = model(nodes, ("y", "total"), **{k: v for k, v in GAMMA.items() if k != "beta" or beta})
    for node in proto.graph.node:
        if node.op_type == op:
            node.output[1] = node.output[2] = ""
    assert_equal(proto)


@pytest.mark.parametrize("types", [True, False])
def test_embeddings_and_how_many_tokens_are_real(types):
    tables = {"table": floats(16, HIDDEN), "kinds": floats(2, HIDDEN)}
    read = (
        "ids segments words table kinds gamma beta mask"
        if types
        else ("ids - words table - gamma beta mask")
    )
    nodes = [
        ("Cast", "input_ids", "ids", {"to": TensorProto.INT32, "domain": ""}),
        ("Mul", "mask zero", "segments", {"domain": ""}),
        ("EmbedLayerNormalization", read, "y count total", {"epsilon": 1e-5}),
        ("Attention", "y w b count", "z", {"num_heads": HEADS}),
    ]
    arrays = {**tables, "w": W, "b": B, "zero": np.asarray(0, np.int32)}
    arrays |= {name: GAMMA[name] for name in ("gamma", "beta")}
    assert_equal(model([MASK, *nodes], ("y", "z", "total"), **arrays))


@pytest.mark.parametrize("mask", ["", "mask", "count"])
@pytest.mark.parametrize(
    "options",
    [{}, {"unidirectional": 1}, {"scale": 0.3}, {"qkv_hidden_sizes": [8, 8, 20]}],
    ids=str,
)
def test_attention_by_one_weight(mask, options):
    node = ("Attention", f"x w b {mask}".strip(), "y", {"num_heads": HEADS, **options})
    used = [MASK, COUNT][: {"": 0, "mask": 1, "count": 2}[mask]]
    assert_equal(model([*used, node], w=W, b=B, **({"unit_axis": ONE} if mask == "count" else {})))


@pytest.mark.parametrize("mask", ["-", "mask", "count"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_of_three_tensors(mask, bias, causal):
    options = {"num_heads": HEADS, "unidirectional": causal}
    node = ("MultiHeadAttention", f"qx kx vx {'b' if bias else '-'} {mask}", "y", options)
    used = [MASK, COUNT][: {"-": 0, "mask": 1, "count": 2}[mask]]
    arrays = {
        **SHARED,
        **({"b": B} if bias else {}),
        **({"unit_axis": ONE} if mask == "count" else {}),
    }
    assert_equal(model([*PARTS, *used, node], **arrays))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_positions(interleaved, part):
    half = (part or HIDDEN // HEADS) // 2
    options = {"interleaved": interleaved, "num_heads": HEADS, "rotary_embedding_dim": part}
    nodes = [
        ("CumSum", "attention_mask axis", "counted", {"domain": ""}),
        ("Sub", "counted axis", "from_zero", {"domain": ""}),
        ("Max", "from_zero nought", "places", {"domain": ""}),
        ("RotaryEmbedding", "x places cos sin", "y", options),
    ]
    tables = {"cos": np.cos(floats(16, half)), "sin": np.sin(floats(16, half))}
    assert_equal(model(nodes, axis=np.asarray(1), nought=np.asarray(0), **tables))


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize(
    "turned", [{}, {"do_rotary": 1}, {"do_rotary": 1, "rotary_interleaved": 1}]
)
def test_grouped_queries(window, turned):
    heads, groups, width = 4, 2, 16
    options = {"num_heads": heads, "kv_num_heads": groups, "local_window_size": window, **turned}
    nodes = [
        *(("MatMul", f"x {name}", f"{name}x", {"domain": ""}) for name in "qkv"),
        MASK,
        COUNT,
        ("Sub", "count unit", "last", {"domain": ""}),
        ("Shape", "input_ids", "sizes", {"domain": "", "start": 1, "end": 2}),
        ("Cast", "sizes", "whole", {"domain": "", "to": TensorProto.INT32}),
        (
            "GroupQueryAttention",
            f"qx kx vx - - last whole{' cos sin' * bool(turned)}",
            "y",
            options,
        ),
    ]
    tables = {"cos": np.cos(floats(16, width // 2)), "sin": np.sin(floats(16, width // 2))}
    arrays = {
        "q": floats(HIDDEN, heads * width),
        **{name: floats(HIDDEN, groups * width) for name in "kv"},
        **(tables if turned else {}),
    }
    assert_equal(model(nodes, unit_axis=ONE, unit=np.asarray(1, np.int32), **arrays))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_few_bits(zeros, bits):
    inputs, outputs, block = HIDDEN, 6, 16  # a block is longer than there are inputs
    packed = RANDOM.integers(0, 256, (outputs, 1, block * bits // 8)).astype(np.uint8)
    arrays = {"w": packed, "s": np.abs(floats(outputs, 1))}
    if zeros:
        arrays["z"] = RANDOM.integers(0, 256, (outputs, 1)).astype(np.uint8)
    options = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    read = "x w s z" if zeros else "x w s"
    proto = model([("MatMulNBits", read, "y", options)], **arrays)
    assert microsoft.note(OnnxGraph(proto)) == (
        f"weights of {bits} bits (MatMulNBits) became float32",
    )
    assert_equal(proto, 2e-4)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (("Attention", "x w b - past", "y"), "it reads 'past' as operand 4"),
        (("Attention", "x w b", "y", {"do_rotary": 1}), "its do_rotary is 1"),
        (("MultiHeadAttention", "x", "y"), "it has no keys or values"),
    ],
)
def test_what_cannot_be_written_so_is_refused_by_name(node, reason):
    options = {"num_heads": HEADS, **(node[3] if len(node) > 3 else {})}
    graph = OnnxGraph(model([(*node[:3], options)], w=W, b=B, past=floats(2, 1, HEADS, 1, 6)))
    with pytest.raises(ModelError) as caught:
        microsoft._expand(graph, _probed(graph), microsoft.ROWS)
    assert f"operator com.microsoft.{node[0]} (node 'n0') cannot be imported" in str(caught.value)
    assert reason in str(caught.value)


def _probed(graph):
    from bertile.onnx.probing import Probes

    x = np.zeros((2, 5, HIDDEN), np.float32)
    return Probes(({"input_ids": x[..., 0]},), ({"x": x, "input_ids": x[..., 0]},))
