"""Products in other words: each becomes MatMul or Gather, and computes the same."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bertile.onnx import products, rewrites
from bertile.onnx.exported import InputSpec
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.probing import probe
from bertile.onnx.samples import run_onnx

RANDOM = np.random.default_rng(0)


def model(nodes, inputs, constants):
    """A model of nodes (operator, inputs, attributes) in a row; the last one makes "y"."""
    row = []
    for place, (op, read, options) in enumerate(nodes):
        name = "y" if place == len(nodes) - 1 else f"n{place}"
        row.append(helper.make_node(op, read, [name], **options))
    types = {"i": TensorProto.INT64, "f": TensorProto.FLOAT}
    graph = helper.make_graph(
        row,
        "g",
        [
            helper.make_tensor_value_info(name, types[array.dtype.kind], [None] * array.ndim)
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def becomes(rewrite, nodes, inputs, constants):
    """The operators that a rewrite leaves; the values stay."""
    before = model(nodes, inputs, constants)
    graph = OnnxGraph(before)
    rewrite(graph)
    after = graph.to_model(17)
    want, got = (run_onnx(m.SerializeToString(), inputs)["y"] for m in (before, after))
    np.testing.assert_allclose(got, want, atol=1e-5)
    return [node.op_type for node in graph.nodes]


def random(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.5}, {"beta": 2.0}, {"alpha": 3.0, "beta": 0.0}]
)
@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_gemm_becomes_a_product(options, turned):
    x = random(*((4, 5) if turned[0] else (5, 4)))
    w = random(*((3, 4) if turned[1] else (4, 3)))
    options = {**options, "transA": turned[0], "transB": turned[1]}
    nodes = [("Gemm", ["x", "w", "b"], options)]
    left = becomes(rewrites.split_gemms, nodes, {"x": x}, {"w": w, "b": random(3)})
    plain = ["MatMul"] if options.get("beta") == 0.0 else ["MatMul", "Add"]
    assert left == ["Transpose"] * turned[0] + plain


@pytest.mark.parametrize(
    ("equation", "weight", "left"),
    [
        ("abc,cd->abd", (6, 5), ["MatMul"]),
        ("abc,cde->abde", (6, 2, 3), ["MatMul", "Reshape"]),
        ("abc,dec->abde", (2, 3, 6), ["MatMul", "Reshape"]),
        ("abc,cde->adbe", (6, 2, 3), ["MatMul", "Reshape", "Transpose"]),
        ("abc,cd", (6, 5), ["MatMul"]),
        ("abc,bcd->ad", (4, 6, 5), ["Reshape", "MatMul"]),
        ("abc , cd -> dab", (6, 5), ["MatMul", "Transpose"]),
    ],
)
def test_an_einsum_with_a_weight_becomes_one_product(equation, weight, left):
    nodes = [("Einsum", ["x", "w"], {"equation": equation})]
    inputs, constants = {"x": random(3, 4, 6)}, {"w": random(*weight)}
    assert becomes(products.expand_einsums, nodes, inputs, constants) == left


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("aecd,abcd->acbe", ((2, 5, 3, 4), (2, 6, 3, 4))),
        ("acbe,aecd->abcd", ((2, 3, 6, 5), (2, 5, 3, 4))),
        ("bhqd,bhkd->bhqk", ((2, 3, 5, 4), (2, 3, 6, 4))),
        ("bqd,bkd->bqk", ((2, 5, 4), (2, 6, 4))),
    ],
)
def test_an_einsum_of_two_tensors_becomes_a_product_of_matrices(equation, shapes):
    nodes = [("Einsum", ["x", "z"], {"equation": equation})]
    inputs = dict(zip("xz", (random(*shape) for shape in shapes)))
    left = becomes(products.expand_einsums, nodes, inputs, {})
    assert left.count("MatMul") == 1 and set(left) <= {"MatMul", "Transpose"}


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ab,ab->ab", ((2, 3), (2, 3))),
        ("ab,c->ac", ((2, 3), (4,))),
        ("a...,a...->a...", ((2, 3),) * 2),
    ],
)
def test_an_einsum_that_is_no_product_of_matrices_stays(equation, shapes):
    nodes = [("Einsum", ["x", "z"], {"equation": equation})]
    inputs = dict(zip("xz", (random(*shape) for shape in shapes)))
    assert becomes(products.expand_einsums, nodes, inputs, {}) == ["Einsum"]


IDS = {"ids": RANDOM.integers(0, 3, (2, 5))}
HOT = {"depth": np.int64(3), "values": np.array([0, 1], np.float32), "table": random(3, 4)}
EQUAL = {"all": np.arange(3)[None], "table": random(3, 4)}
COLUMN, LAST = {"shape": np.array([-1, 1])}, {"axis": np.array([2])}
ROWS = {"shape": np.array([-1, 3])}


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([("OneHot", ["ids", "depth", "values"], {}), ("MatMul", ["n0", "table"], {})], HOT),
        (
            [
                ("OneHot", ["ids", "depth", "values"], {}),
                ("Reshape", ["n0", "shape"], {}),
                ("MatMul", ["n1", "table"], {}),
            ],
            {**HOT, **ROWS},
        ),
        (
            [
                ("Reshape", ["ids", "shape"], {}),
                ("Equal", ["n0", "all"], {}),
                ("Cast", ["n1"], {"to": TensorProto.FLOAT}),
                ("MatMul", ["n2", "table"], {}),
            ],
            {**EQUAL, **COLUMN},
        ),
        (
            [
                ("Unsqueeze", ["ids", "axis"], {}),
                ("Equal", ["all", "n0"], {}),
                ("Cast", ["n1"], {"to": TensorProto.FLOAT}),
                ("MatMul", ["n2", "table"], {}),
            ],
            {**EQUAL, **LAST},
        ),
    ],
)
def test_a_product_of_one_hots_is_a_lookup(nodes, constants):
    left = becomes(products.look_up_one_hots, nodes, IDS, constants)
    assert "Gather" in left and not {"MatMul", "OneHot", "Equal"} & set(left)


@pytest.mark.parametrize(
    "changed", [{"values": np.array([0, 2], np.float32)}, {"values": np.array([1, 0], np.float32)}]
)
def test_other_numbers_than_one_and_zero_are_no_lookup(changed):
    nodes = [("OneHot", ["ids", "depth", "values"], {}), ("MatMul", ["n0", "table"], {})]
    left = becomes(products.look_up_one_hots, nodes, IDS, {**HOT, **changed})
    assert left == ["OneHot", "MatMul"]


def test_the_sum_of_products_by_head_is_one_product():
    """(B, heads, S, D) by (heads, D, C), added up."""
    nodes = [
        ("Gather", ["words", "input_ids"], {}),
        ("Unsqueeze", ["n0", "one"], {}),
        ("MatMul", ["n1", "in"], {}),
        ("Tanh", ["n2"], {}),
        ("MatMul", ["n3", "out"], {}),
        ("ReduceSum", ["n4", "one"], {"keepdims": 0}),
    ]
    weights = {"words": random(9, 6), "in": random(2, 6, 3), "out": random(2, 3, 5)}
    constants = {**weights, "one": np.array([1])}
    inputs = {"input_ids": RANDOM.integers(0, 9, (2, 7))}

    def rewrite(graph):
        probes = probe(graph, (InputSpec("input_ids", below=9),), 17, None, None)
        products.join_heads(graph, probes)

    left = becomes(rewrite, nodes, inputs, constants)
    assert "ReduceSum" not in left and left.count("MatMul") == 2
    assert left.count("Transpose") == 2


def test_a_cut_out_part_gets_a_product_of_its_own():
    """Channels 2 and 0 of each head: a product of these columns."""
    nodes = [
        ("Gather", ["words", "input_ids"], {}),
        ("MatMul", ["n0", "w"], {}),
        ("Add", ["n1", "b"], {}),
        ("Reshape", ["n2", "split"], {}),
        ("Gather", ["n3", "picked"], {"axis": 3}),
        ("Transpose", ["n4"], {"perm": [0, 2, 1, 3]}),
        ("Tanh", ["n5"], {}),
    ]
    weights = {"words": random(9, 5), "w": random(5, 6), "b": random(6)}
    numbers = {"split": np.array([0, 0, 2, 3]), "picked": np.array([2, 0])}
    inputs = {"input_ids": RANDOM.integers(0, 9, (2, 7))}
    columns = []

    def rewrite(graph):
        probes = probe(graph, (InputSpec("input_ids", below=9),), 17, None, None)
        products.cut_products(graph, probes)
        product = next(node for node in graph.nodes if node.op_type == "MatMul")
        columns.append(graph.array(product.input[1]))

    left = becomes(rewrite, nodes, inputs, {**weights, **numbers})
    assert left == ["Gather", "MatMul", "Add", "Reshape", "Transpose", "Tanh"]
    np.testing.assert_array_equal(columns[0], weights["w"][:, [2, 0, 5, 3]])
