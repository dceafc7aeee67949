"""config.json: what an encoder may say, and one sentence with the file's name for all else."""

from __future__ import annotations

import json

import pytest

from bertile.base.errors import ModelError
from bertile.families import model_config

SIZES = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 500}


def write(directory, config, text=None):
    (directory / "config.json").write_text(json.dumps(config) if text is None else text)
    return directory


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"pad_token_id": None, "architectures": None, "id2label": {"1": "b", "0": 3}},
        {"pad_token_id": -1, "num_labels": 3, "auto_map": {}, "layer_norm_eps": 1},
        {"type_vocab_size": 0, "pruned_heads": {"0": [1, 2]}, "is_decoder": None},
        {"task_specific_params": {"a": {"b": [1, {"c": 2}]}}, "unknown": [1, 2]},
    ],
)
def test_read_gives_what_an_encoder_says(tmp_path, more):
    assert model_config.read(write(tmp_path, {**SIZES, **more})) == {**SIZES, **more}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "says num_hidden_layers 1000000000; expected is a whole",
        ),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1; expected is a whole number from 1 to"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0; expected"),
        ({"num_hidden_layers": True}, "num_hidden_layers True; expected"),
        ({"num_hidden_layers": None}, "num_hidden_layers None; expected"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers '2'; expected"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers 2.5; expected"),
        ({"n_layers": 1e30}, "n_layers 1e+30; expected"),
        ({"num_attention_heads": 0}, "num_attention_heads 0; expected"),
        ({"hidden_size": [128]}, "hidden_size [128]; expected"),
        ({"intermediate_size": 1 << 40}, "expected is a whole number from 1 to 262144"),
        ({"vocab_size": {}}, "vocab_size {}; expected"),
        ({"max_position_embeddings": -1}, "max_position_embeddings -1; expected"),
        ({"type_vocab_size": -2}, "type_vocab_size -2; expected"),
        ({"pad_token_id": -5}, "pad_token_id -5; expected is a whole number from -1"),
        ({"pad_token_id": [0]}, "pad_token_id [0]; expected"),
        ({"pad_token_id": 500}, "says pad_token_id 500, but its vocab_size is 500"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan; expected is a number from 0 to 1"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps '1e-12'; expected"),
        ({"architectures": "BertModel"}, "architectures 'BertModel'; expected is a list of names"),
        ({"architectures": [1]}, "architectures [1]; expected"),
        ({"id2label": ["a"]}, "id2label ['a']; expected is an object of names by their number"),
        ({"id2label": {"a": "b"}}, "id2label {'a': 'b'}; expected"),
        ({"id2label": {"0": ["b"]}}, "id2label {'0': ['b']}; expected"),
        ({"auto_map": ["x"]}, "auto_map ['x']; expected is an object"),
        ({"position_embedding_type": 3}, "position_embedding_type 3; expected is a name"),
        ({"is_decoder": "no"}, "is_decoder 'no'; expected is true or false"),
        ({"pruned_heads": {"0": 1}}, "pruned_heads {'0': 1}; expected is an object of lists"),
        ({"pruned_heads": {"0": ["a"]}}, "expected is an object of lists of heads by their layer"),
        ({"label2id": "x" * 999}, "xxx...; expected is an object"),
        ({"model_type": ["bert"]}, "model_type ['bert']; expected is a name"),
        ({"model_type": None}, "does not say of what model_type the model is"),
        ({"model_type": "gpt2", "hidden_size": 1 << 30}, "hidden_size 1073741824; expected"),
        ({"model_type": "gpt2", "num_hidden_layers": 1 << 20}, "num_hidden_layers 1048576; exp"),
    ],
)
def test_read_names_the_value_that_no_encoder_has(tmp_path, changes, message):
    with pytest.raises(ModelError) as caught:
        model_config.read(write(tmp_path, {**SIZES, **changes}))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("changes", [{"hidden_size": [8, 16]}, {"num_attention_heads": None}])
def test_read_leaves_forms_of_a_type_without_a_row_to_transformers(tmp_path, changes):
    config = {**SIZES, "model_type": "opt", **changes}
    assert model_config.read(write(tmp_path, config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "is not a JSON object, but of type int"),
        ("null", "is not a JSON object, but of type NoneType"),
        ('["bert"]', "is not a JSON object, but of type list"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ('{"a": ' * 40 + "1" + "}" * 40, "it is nested too deep"),
        ("[" * 10**6, "it is nested too deep"),
        ('{"hidden_size": ' + "9" * 10**5 + "}", "cannot be read"),
    ],
)
def test_read_refuses_what_is_no_config(tmp_path, text, message):
    directory = write(tmp_path, None, text)
    for read in (model_config.read, model_config.beside):
        with pytest.raises(ModelError, match=message):
            read(directory)


def test_read_refuses_what_is_no_text_or_no_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match="cannot be read"):
        model_config.read(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json; give the directory"):
        model_config.read(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json' is not a file"):
        model_config.read(tmp_path)
    (tmp_path / "config.json").rmdir()
    monkeypatch.setattr(model_config, "LARGEST", 10)
    with pytest.raises(ModelError, match="is larger than"):
        model_config.read(write(tmp_path, SIZES))


def test_beside_an_onnx_file_only_what_is_read_is_checked(tmp_path):
    assert model_config.beside(tmp_path) == {}
    config = {"model_type": "swin", "hidden_size": [1, 2], "id2label": {"10": "c", "9": "b"}}
    read = model_config.beside(write(tmp_path, config))
    assert model_config.labels(read) == ("b", "c")
    assert model_config.padding_id(read) == 0
    with pytest.raises(ModelError, match="id2label"):
        model_config.beside(write(tmp_path, {"id2label": [1]}))


@pytest.mark.parametrize(
    ("value", "filler"), [({}, 0), ({"pad_token_id": None}, 0), ({"pad_token_id": -1}, 0)]
)
def test_padding_id_is_one_that_the_model_has(value, filler):
    assert model_config.padding_id(value) == filler
    assert model_config.padding_id({"pad_token_id": 7}) == 7
