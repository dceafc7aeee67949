"""Constants in every form that ONNX has: each is read as the same weight."""

from collections import Counter

import numpy as np
import onnx
import pytest
from helpers import spelled_encoder as spelled
from helpers.foreign_forms import operators
from onnx import TensorProto, helper, numpy_helper

from bertile.config import Config
from bertile.onnx import constants, normalizer
from bertile.onnx.graph import OnnxGraph, dense_array
from bertile.onnx.samples import run_onnx


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small encoder whose weights are initializers, and what it computes."""
    path = spelled.write(tmp_path_factory.mktemp("plain") / "m.onnx", spelled.Encoder(layers=1))
    return path, run_onnx(path, feed())


def feed():
    random = np.random.default_rng(3)
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    words = random.integers(1, spelled.WORDS, mask.shape)
    return {"input_ids": words, "attention_mask": mask, "token_type_ids": words % 2}


def typed(name, array):
    """Numbers in the field of their type, not as bytes."""
    return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.reshape(-1).tolist())


def from_constant(name, array):
    node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
    return [node], []


def from_floats(name, array):
    flat = helper.make_node("Constant", [], [f"{name}.flat"], value_floats=array.reshape(-1))
    shape = helper.make_node("Constant", [], [f"{name}.shape"], value_ints=array.shape)
    return [
        flat,
        shape,
        helper.make_node("Reshape", list(flat.output) + list(shape.output), [name]),
    ], []


def sparse(name, array, coordinates):
    """All elements of a tensor as a sparse one has them."""
    places = np.arange(array.size)
    if coordinates:
        places = np.stack(np.unravel_index(places, array.shape), 1)
    values = numpy_helper.from_array(array.reshape(-1), name)
    places = numpy_helper.from_array(places.astype(np.int64), "")
    return helper.make_sparse_tensor(values, places, array.shape)


def from_sparse(name, array):
    value = sparse("", array, coordinates=array.ndim > 1)
    return [helper.make_node("Constant", [], [name], sparse_value=value)], []


def from_typed(name, array):
    return [], [typed(name, array)]


def from_identity(name, array):
    return [helper.make_node("Identity", [f"{name}.x"], [name])], [typed(f"{name}.x", array)]


def from_transpose(name, array):
    turned = numpy_helper.from_array(np.ascontiguousarray(array.T), f"{name}.x")
    return [helper.make_node("Transpose", [f"{name}.x"], [name])], [turned]


def from_reshape(name, array):
    flat = numpy_helper.from_array(array.reshape(-1), f"{name}.x")
    shape = numpy_helper.from_array(np.asarray(array.shape, np.int64), f"{name}.shape")
    return [helper.make_node("Reshape", [flat.name, shape.name], [name])], [flat, shape]


def from_arithmetic(name, array):
    """A tensor of equal numbers, and what is added to it."""
    shape = numpy_helper.from_array(np.asarray(array.shape, np.int64), f"{name}.shape")
    half = numpy_helper.from_array(np.asarray([0.5], np.float32))
    equal = helper.make_node("ConstantOfShape", [shape.name], [f"{name}.equal"], value=half)
    rest = numpy_helper.from_array(array - np.float32(0.5), f"{name}.rest")
    total = helper.make_node("Add", [f"{name}.equal", rest.name], [name])
    return [equal, total], [shape, rest]


def from_integers(name, array):
    """What a float16 quantizer of weights alone writes."""
    scale = np.float32(np.abs(array).max() / 127)
    integers = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
    parts = [numpy_helper.from_array(integers, f"{name}.x")]
    parts += [numpy_helper.from_array(scale, f"{name}.scale")]
    return [helper.make_node("DequantizeLinear", [p.name for p in parts], [name])], parts


FORMS = [
    *(from_typed, from_constant, from_floats, from_sparse, from_identity, from_transpose),
    *(from_reshape, from_arithmetic, from_integers),
]


def stored(path, target, form):
    """Write the model with each of its weights in another form."""
    model = onnx.load(path)
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims]
    others = [t for t in model.graph.initializer if t not in weights]
    nodes, tensors = [], list(others)
    for weight in weights:
        first, rest = form(weight.name, numpy_helper.to_array(weight))
        nodes += first
        tensors += rest
    inner = list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend([*nodes, *inner])
    model.graph.initializer.extend(tensors)
    onnx.save(model, target)
    return target


def assert_same(path, plain, tmp_path, tolerance=1e-6):
    before, want = plain
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    got = run_onnx(exported.onnx_path, feed())["last_hidden_state"]
    real = feed()["attention_mask"] == 1
    np.testing.assert_allclose(got[real], want["last_hidden_state"][real], atol=tolerance)
    first = normalizer.normalize(before, tmp_path / "before", Config())
    counts = [Counter(operators(onnx.load(e.onnx_path))) for e in (exported, first)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_constant_is_the_same_weight(plain, tmp_path, form):
    path = stored(plain[0], tmp_path / "m.onnx", form)
    assert_same(path, plain, tmp_path, 0.2 if form is from_integers else 1e-5)


def test_weights_that_are_listed_among_the_inputs_are_no_inputs(plain, tmp_path):
    model = onnx.load(plain[0])
    for weight in model.graph.initializer:
        value = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        model.graph.input.append(value)
    onnx.save(model, tmp_path / "m.onnx")
    assert_same(tmp_path / "m.onnx", plain, tmp_path)


@pytest.mark.parametrize("coordinates", [False, True])
def test_a_sparse_initializer_is_an_array(coordinates):
    array = np.array([[0, 1.5, 0], [2, 0, 3]], np.float32)
    model = onnx.ModelProto()
    places = np.flatnonzero(array)
    values = numpy_helper.from_array(array.reshape(-1)[places], "w")
    if coordinates:
        places = np.stack(np.unravel_index(places, array.shape), 1)
    places = numpy_helper.from_array(places.astype(np.int64), "")
    sparse_weight = helper.make_sparse_tensor(values, places, array.shape)
    model.graph.sparse_initializer.append(sparse_weight)
    np.testing.assert_array_equal(dense_array(sparse_weight), array)
    np.testing.assert_array_equal(OnnxGraph(model).array("w"), array)


def test_what_constants_alone_decide_is_computed_once():
    model = onnx.ModelProto()
    model.graph.initializer.append(numpy_helper.from_array(np.eye(2, 3, dtype=np.float32), "w"))
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]))
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    nodes = [("Transpose", ["w"], ["t"]), ("Exp", ["t"], ["e"]), ("MatMul", ["e", "x"], ["y"])]
    model.graph.node.extend(helper.make_node(*node) for node in nodes)
    graph = OnnxGraph(model)
    constants.fold(graph, 17)
    assert [node.op_type for node in graph.nodes] == ["MatMul"]
    np.testing.assert_allclose(graph.array(graph.nodes[0].input[0]), np.exp(np.eye(3, 2)), 1e-6)
