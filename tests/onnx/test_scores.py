"""What two right results may differ by grows with the scores before a softmax."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from helpers import foreign_forms as forms
from onnx import TensorProto, helper

import bertile
from bertile.config import Config
from bertile.onnx.samples import session
from bertile.onnx.scores import rounding
from bertile.verify import verifier

FEED = {"input_ids": np.array([[0, 1, 2, 3]])}


def attention(scores: list[float], path, weighs: bool = True):
    """A file whose softmax takes these scores, by id, and weighs a table with them or not."""
    arrays = {
        "scores": np.asarray(scores, np.float32)[:, None],
        "values": np.ones((4, 8), np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["scores", "input_ids"], ["column"]),
        helper.make_node("Transpose", ["column"], ["row"], perm=[0, 2, 1]),
        helper.make_node("Softmax", ["row"], ["weights"], axis=-1),
        helper.make_node("MatMul" if weighs else "Mul", ["weights", "values"], ["out"]),
    ]
    if not weighs:
        arrays["values"] = np.ones(4, np.float32)
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("scores", "factor"),
    [
        ([3, 2, 1, 0], 1),
        ([2000, 0, 0, 0], 20),
        ([-2000, -2000, -2000, -2000], 20),
        ([50, -10000, -1e29, -np.inf], 1),
        ([450, 440, -9e3, 0], 4.5),
    ],
    ids=["usual", "large", "all low", "masked", "two that count"],
)
def test_tolerance_grows_with_the_scores_that_count(tmp_path, scores, factor):
    assert rounding(attention(scores, tmp_path / "m.onnx"), [FEED]) == pytest.approx(factor)


def test_scores_that_weigh_no_values_do_not_count(tmp_path):
    assert rounding(attention([2000, 0, 0, 0], tmp_path / "m.onnx", False), [FEED]) == 1


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A file whose attention has scores of some thousands, and its bundle."""
    directory = tmp_path_factory.mktemp("sharp")

    def sharpen(model):
        with torch.no_grad():
            query = model.encoder.layer[0].attention.self.query
            query.weight *= 3000

    path = forms.write(directory / "m.onnx", layers=1, attention="eager", change=sharpen)
    bertile.compile(path, directory / "out", Config(cache_dir=str(directory / "cache")))
    return path, directory / "out"


def test_model_with_large_scores_compiles_and_is_as_near_as_rounding_allows(sharp):
    path, bundle = sharp
    random = np.random.default_rng(5)
    arrays = {
        "input_ids": random.integers(0, 300, (3, 37)),
        "attention_mask": (np.arange(37) < np.array([[37], [20], [1]])).astype("int64"),
        "token_type_ids": random.integers(0, 2, (3, 37)),
    }
    largest = rounding(path, [arrays])
    assert 7 < largest < 200
    got, want = bertile.load(bundle)(**arrays)["last_hidden_state"], session(path).run(None, arrays)
    real = arrays["attention_mask"] != 0
    assert np.abs(got[real] - want[0][real]).max() <= 1e-4 * largest * np.abs(want[0]).max()


def test_other_weights_stay_beyond_the_tolerance_of_large_scores(sharp, tmp_path):
    path, bundle = sharp
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("value.bias"):
            array = onnx.numpy_helper.to_array(tensor) + np.float32(0.5)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    check = verifier.verify(bundle, tmp_path / "other.onnx")
    assert check["max_abs_difference"] > check["tolerance"]
