"""Inputs of any exporter's file come in; ours go out, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import foreign_forms as forms
from helpers.lookups import VOCABULARY, lookups
from onnx import TensorProto, helper

import bertile
from bertile import loader
from bertile.base.errors import InputError, ModelError, UsageError
from bertile.config import Config
from bertile.onnx import lookups as tables
from bertile.onnx import normalizer
from bertile.onnx.inputs import canonical_names
from bertile.onnx.samples import session

ROOM = 5e-5  # two layers in float32, in another order of sums


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> onnx.ModelProto:
    """One layer of BERT, its inputs named and typed as transformers has them."""
    path = tmp_path_factory.mktemp("traced") / "m.onnx"
    return onnx.load(forms.write(path, layers=1, attention="eager"))


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return model


def saved(model: onnx.ModelProto, directory: Path) -> Path:
    onnx.save(model, directory / "m.onnx")
    return directory / "m.onnx"


def request(batch: int, length: int, below: int = VOCABULARY) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch + length)
    real = random.integers(1, length + 1, batch)
    return {
        "input_ids": random.integers(0, below, (batch, length)),
        "attention_mask": (np.arange(length) < real[:, None]).astype("int64"),
        "token_type_ids": random.integers(0, 2, (batch, length)),
    }


def by_onnxruntime(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a file for arrays in the order of its inputs, in the types it wants."""
    runner = session(path)
    kinds = {"tensor(float)": "float32", "tensor(bool)": "bool", "tensor(float16)": "float16"}
    feed = {}
    for argument, array in zip(runner.get_inputs(), arrays.values()):
        kind = kinds.get(argument.type, argument.type[len("tensor(") : -1])
        feed[argument.name] = array.astype(kind)
    return runner.run(None, feed)[0]


def assert_same(exported, path: Path, shapes=((1, 1), (3, 13), (2, 16))) -> None:
    names = [argument.name for argument in session(exported.onnx_path).get_inputs()]
    for shape in shapes:
        arrays = request(*shape)
        want = by_onnxruntime(path, arrays)
        got = by_onnxruntime(exported.onnx_path, {name: arrays[name] for name in names})
        real = arrays["attention_mask"] != 0
        assert np.abs(got[real] - want[real]).max() <= ROOM


@pytest.mark.parametrize(
    "names",
    [
        {"attention_mask": "input_mask", "token_type_ids": "segment_ids"},
        {"input_ids": "input_ids_1", "attention_mask": "attention_mask:0"},
        {"input_ids": "serving_default_input_word_ids:0", "token_type_ids": "input_type_ids.1"},
        {"attention_mask": "token_type_ids_1", "token_type_ids": "attention_mask_1"},
    ],
    ids=["Google's BERT", "numbered", "TensorFlow's hub", "crossed"],
)
def test_known_names_of_inputs_are_ours(tmp_path, traced, names):
    path = saved(renamed(traced, names), tmp_path)
    crossed = "token_type_ids_1" in names.values()
    rename = ("token_type_ids_1=attention_mask", "attention_mask_1=token_type_ids")
    config = Config(rename=rename if crossed else ())
    exported = normalizer.normalize(path, tmp_path / "out", config)
    assert [spec.name for spec in exported.inputs] == list(request(1, 1))
    for ours, theirs in names.items():
        assert f"the input '{theirs}' of the file is called {ours}" in exported.notes
    assert_same(exported, path)


def test_names_are_given_by_who_asks_then_by_what_they_are_then_by_resemblance():
    path = Path("m.onnx")
    assert canonical_names(["ids", "x"], path, ["x=attention_mask"]) == {
        "ids": "input_ids",
        "x": "attention_mask",
    }
    with pytest.raises(ModelError, match="has the input 'input_mask', which is unsupported"):
        canonical_names(["input_ids", "attention_mask", "input_mask"], path)
    with pytest.raises(ModelError, match="--rename pixels=input_ids"):
        canonical_names(["pixels"], path)
    with pytest.raises(ModelError, match=r"no input 'input_ids' \(it has attention_mask\)"):
        canonical_names(["attention_mask"], path)
    with pytest.raises(UsageError, match=r"no input 'idz' to rename.*did you mean 'ids'"):
        canonical_names(["ids"], path, ["idz=input_ids"])
    with pytest.raises(UsageError, match="no input is called 'input_idx'"):
        canonical_names(["ids"], path, ["ids=input_idx"])
    with pytest.raises(ModelError, match=r"two inputs of 'm\.onnx' would be called 'input_ids'"):
        canonical_names(["a", "b"], path, ["a=input_ids", "b=input_ids"])


@pytest.mark.parametrize("entry", ["ids", "=input_ids", "ids=", 3])
def test_rename_that_names_nothing_is_refused(entry):
    with pytest.raises(UsageError, match="rename"):
        Config(rename=(entry,))


@pytest.mark.parametrize("kind", ["FLOAT", "BOOL", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT32"])
def test_mask_of_any_type_is_an_integer(tmp_path, traced, kind):
    """The graph casts its mask to int64 first, as an exporter does that was given another type."""
    model = renamed(traced, {"attention_mask": "cast"})
    value = model.graph.input[1]
    value.name, value.type.tensor_type.elem_type = "attention_mask", getattr(TensorProto, kind)
    cast = helper.make_node("Cast", ["attention_mask"], ["cast"], to=TensorProto.INT64)
    model.graph.node.insert(0, cast)
    path = saved(model, tmp_path)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    mask = exported.inputs[1]
    assert (mask.name, mask.dtype) == ("attention_mask", "int32" if kind == "INT32" else "int64")
    assert_same(exported, path)


@pytest.mark.parametrize("form", ["-1", "no shape"])
def test_axes_of_no_size_are_dynamic(tmp_path, traced, form):
    model = onnx.ModelProto.FromString(traced.SerializeToString())
    for value in [*model.graph.input, *model.graph.output]:
        if form == "no shape":
            value.type.tensor_type.ClearField("shape")
            continue
        for dim in value.type.tensor_type.shape.dim[:2]:
            dim.dim_value = -1
    path = saved(model, tmp_path)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert (exported.batch, exported.length) == (None, None)
    assert_same(exported, path)


@pytest.mark.parametrize("shape", [[], ["batch"], ["batch", "length", 1]])
def test_input_of_another_rank_is_refused_by_name(tmp_path, traced, shape):
    model = onnx.ModelProto.FromString(traced.SerializeToString())
    value = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, shape)
    model.graph.input[1].CopyFrom(value)
    with pytest.raises(ModelError, match=r"input 'attention_mask' of .* is no"):
        normalizer.normalize(saved(model, tmp_path), tmp_path / "out", Config())


# How each makes the index of the table of words: what its ids must be below.
INDICES = {
    "ids": ("input_ids", (), VOCABULARY),
    "shifted": ("i", (helper.make_node("Sub", ["input_ids", "minus"], ["i"]),), VOCABULARY - 3),
    "flattened": (
        "i",
        (
            helper.make_node("Shape", ["input_ids"], ["shape"]),
            helper.make_node("Reshape", ["input_ids", "flat"], ["row"]),
            helper.make_node("Reshape", ["row", "shape"], ["i"]),
        ),
        VOCABULARY,
    ),
    "by a minimum": (
        "i",
        (helper.make_node("Max", ["input_ids", "lowest"], ["i"]),),
        VOCABULARY,
    ),
    "clipped": (
        "i",
        (helper.make_node("Clip", ["input_ids", "lowest", "highest"], ["i"]),),
        None,
    ),
}


@pytest.mark.parametrize("index", INDICES)
def test_limits_of_ids_and_places_come_from_the_graph(tmp_path, index):
    ids, before, below = INDICES[index]
    kinds = {"input_ids": TensorProto.INT64, "position_ids": TensorProto.INT32}
    path = saved(lookups(ids, before, **kinds), tmp_path)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert [(spec.name, spec.below) for spec in exported.inputs] == [
        ("input_ids", below),
        ("position_ids", 40),
    ]
    assert exported.max_length == 40


COUNTED = (
    helper.make_node("Max", ["lowest", "lowest"], ["axis"]),
    helper.make_node("Sub", ["axis", "minus"], ["three"]),
    helper.make_node("Div", ["three", "three"], ["one"]),
    helper.make_node("CumSum", ["attention_mask", "one"], ["position_ids"]),
)


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_length_is_limited_by_what_counts_real_tokens(tmp_path, batch):
    """Positions from 1 on, in a table of 40: whether or not the batch is static."""
    kinds = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64}
    model = lookups("input_ids", COUNTED, **kinds)
    for value in model.graph.input:
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.INT64, [batch, "s"]))
    exported = normalizer.normalize(saved(model, tmp_path), tmp_path / "out", Config())
    assert (exported.batch, exported.max_length) == (None if batch == "batch" else batch, 39)


@pytest.fixture(scope="module")
def placed(tmp_path_factory) -> tuple[Path, loader.Model]:
    """A file whose positions are an input, and its bundle."""
    directory = tmp_path_factory.mktemp("placed")
    kinds = {"input_ids": TensorProto.INT64, "position_ids": TensorProto.INT32}
    path = saved(lookups(**kinds), directory)
    bertile.compile(path, directory / "out", Config(cache_dir=str(directory / "cache")))
    return path, bertile.load(directory / "out")


def test_positions_are_an_input_that_counts_from_0_where_it_is_missing(placed):
    path, model = placed
    random = np.random.default_rng(1)
    for shape in ((1, 1), (3, 37), (9, 40)):
        ids = random.integers(0, VOCABULARY, shape)
        counted = np.broadcast_to(np.arange(shape[1]), shape)
        for places in (counted, random.integers(0, 40, shape)):
            want = by_onnxruntime(path, {"ids": ids, "places": places})
            got = model(input_ids=ids, position_ids=places)["last_hidden_state"]
            assert np.abs(got - want).max() <= ROOM
        want = by_onnxruntime(path, {"ids": ids, "places": counted})
        assert np.abs(model(input_ids=ids)["last_hidden_state"] - want).max() <= ROOM
    with pytest.raises(InputError, match=r"position_ids\[0, 1\] is 40"):
        model(input_ids=[[1, 2]], position_ids=[[0, 40]])


def test_model_takes_inputs_that_it_lacks_where_they_change_nothing(placed):
    _, model = placed
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    want = model(input_ids=ids)["last_hidden_state"]
    neutral = {"token_type_ids": np.zeros_like(ids), "attention_mask": np.ones((2, 3), bool)}
    assert np.array_equal(model(input_ids=ids, **neutral)["last_hidden_state"], want)
    for name, array, words in (
        ("token_type_ids", [[0, 0, 1], [0, 0, 0]], "all zeros"),
        ("attention_mask", [[1, 1, 1], [1, 1, 0]], "all ones"),
    ):
        with pytest.raises(InputError, match=rf"no input '{name}'.* not {words}"):
            model(input_ids=ids, **{name: array})
    with pytest.raises(InputError, match="token_type_ids has shape"):
        model(input_ids=ids, token_type_ids=[[0]])


def test_mask_of_floats_is_taken_where_it_is_0_and_1():
    specs = [
        {"name": "input_ids", "dtype": "int64", "below": 9, "default": None},
        {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
    ]
    inputs = {"input_ids": [[1, 2]], "attention_mask": np.array([[1.0, 0.0]])}
    checked = loader.check_inputs(inputs, specs, None)
    assert checked["attention_mask"].tolist() == [[1, 0]]
    for wrong in (0.5, np.nan, 2.0):
        inputs["attention_mask"] = np.array([[1.0, wrong]])
        with pytest.raises(InputError, match="attention_mask"):
            loader.check_inputs(inputs, specs, None)


def test_no_name_of_an_input_hits_a_parameter_of_the_call(placed):
    with pytest.raises(InputError, match="the model has no input 'self'"):
        placed[1](input_ids=[[1]], self=[[1]])


def test_lookup_by_pairs_of_places_is_tried_in_short_sequences_alone(tmp_path, monkeypatch):
    """Distances that are clipped fit their table in any length, and grow with its square."""
    seen, real = [], tables.evaluated

    def evaluated(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(tables, "evaluated", evaluated)
    monkeypatch.setattr(tables, "MOST", 1 << 12)
    model = lookups("input_ids", input_ids=TensorProto.INT64, position_ids=TensorProto.INT32)
    numbers = {"zero": 0, "step": 1, "low": -3, "high": 3, "first": [0], "second": [1]}
    arrays = {name: np.array(number) for name, number in numbers.items()}
    arrays["near"] = np.random.default_rng(1).standard_normal((7, 8)).astype("float32")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    make = helper.make_node
    model.graph.node[-2].output[0] = "plain"
    model.graph.node.insert(3, make("Add", ["plain", "bias"], ["sum"]))
    pairs = [
        make("Shape", ["input_ids"], ["length"], start=1, end=2),
        make("Squeeze", ["length"], ["end"]),
        make("Range", ["zero", "end", "step"], ["range"]),
        make("Unsqueeze", ["range", "first"], ["across"]),
        make("Unsqueeze", ["range", "second"], ["down"]),
        make("Sub", ["across", "down"], ["apart"]),
        make("Clip", ["apart", "low", "high"], ["clipped"]),
        make("Add", ["clipped", "high"], ["pair"]),
        make("Gather", ["near", "pair"], ["pairs"]),
        make("ReduceMean", ["pairs"], ["bias"], axes=[0], keepdims=0),
    ]
    for place, node in enumerate(pairs):
        model.graph.node.insert(place, node)
    exported = normalizer.normalize(saved(model, tmp_path), tmp_path / "out", Config())
    assert exported.max_length == 40  # by the other table
    assert max(index.size for index in seen if index is not None) <= 4 << 12
