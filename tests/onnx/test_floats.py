"""Models in other floats: all become float32, and compute what ONNX Runtime makes of them."""

import numpy as np
import onnx
import pytest
from helpers import spelled_encoder as spelled
from helpers.foreign_forms import operators
from onnx import TensorProto, helper, numpy_helper

from bertile.config import Config
from bertile.onnx import floats, normalizer
from bertile.onnx.graph import OnnxGraph
from bertile.onnx.samples import run_onnx

KINDS = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return spelled.write(tmp_path_factory.mktemp("plain") / "m.onnx", spelled.Encoder(layers=1))


def stored(path, target, kind):
    """Weights in another type, each cast to float32 where it is read."""
    model = onnx.load(path)
    casts = []
    for weight in [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]:
        array = numpy_helper.to_array(weight).astype(helper.tensor_dtype_to_np_dtype(kind))
        casts.append(helper.make_node("Cast", [f"{weight.name}.x"], [weight.name], to=1))
        weight.CopyFrom(numpy_helper.from_array(array, f"{weight.name}.x"))
        weight.data_type = kind
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)
    return target


def whole(path, target, keep):
    """Everything in float16, as ONNX Runtime's converter writes it."""
    convert = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    onnx.save(convert(onnx.load(path), keep_io_types=keep), target)
    return target


def assert_equal(path, tmp_path, tolerance):
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    model = onnx.load(exported.onnx_path)
    held = {tensor.data_type for tensor in model.graph.initializer}
    assert not held & set(floats.NAMES)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    names = operators(model)
    assert (names.count("LayerNormalization"), names.count("Gelu")) == (3, 1)
    random = np.random.default_rng(0)
    for shape in ((1, 1), (3, 11)):
        mask = (np.arange(shape[1]) < random.integers(1, shape[1] + 1, (shape[0], 1))) * 1
        words = random.integers(1, spelled.WORDS, shape)
        feed = {"input_ids": words, "attention_mask": mask, "token_type_ids": words % 2}
        want, got = (run_onnx(p, feed)["last_hidden_state"] for p in (path, exported.onnx_path))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=tolerance)
    return exported


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_stored_in_other_floats(plain, tmp_path, kind):
    path = stored(plain, tmp_path / "m.onnx", KINDS[kind])
    exported = assert_equal(path, tmp_path, 1e-5)
    assert exported.notes[0] == f"{kind} became float32"


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_may_compute_in_float16(plain, tmp_path, keep):
    exported = assert_equal(whole(plain, tmp_path / "m.onnx", keep), tmp_path, 0.02)
    also = "" if keep else ", the outputs too: last_hidden_state"
    assert exported.notes[0] == f"float16 became float32{also}"
    assert "differs from the float16 original by" in exported.notes[-1]


def test_rounded_numbers_of_gelu_are_those_that_are_meant():
    graph = OnnxGraph(onnx.ModelProto())
    graph.set_constant("root", np.asarray(np.sqrt(2), np.float16))
    graph.set_constant("other", np.asarray([1.4], np.float16))
    assert floats.to_float32(graph) == ("float16",)
    assert graph.array("root") == np.float32(np.sqrt(2))
    assert graph.array("other") == np.float32(np.float16(1.4))
