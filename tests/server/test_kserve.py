"""KServe's messages: what a client may send is read, what it may not is refused by its name."""

from __future__ import annotations

import gzip
import json
import struct
import zlib

import numpy as np
import pytest

from bertile.errors import InputError
from bertile.server import kserve
from bertile.server.kserve import Asked


def request(**entry: object) -> dict:
    entry = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "é"], **entry}
    return {"inputs": [{key: value for key, value in entry.items() if value is not None}]}


def read(message: object, tail: bytes = b"") -> kserve.Request:
    header = json.dumps(message).encode()
    return kserve.read(header + tail, str(len(header)) if tail else None)


def strings(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@pytest.mark.parametrize(
    "data, shape",
    [(["a", "é"], [2]), ([["a"], ["é"]], [2, 1]), (["a", "é"], [2, 1]), (["a", "é"], [1, 2])],
)
def test_texts_come_flat_or_as_their_shape_says(data: list, shape: list[int]) -> None:
    array = read(request(data=data, shape=shape)).inputs["text"]
    assert array.reshape(-1).tolist() == [b"a", "é".encode()] and list(array.shape) == shape


def test_texts_of_a_column_are_a_list() -> None:
    array = read(request(data=["a", "é"], shape=[2, 1])).inputs["text"]
    assert kserve.texts(array, "text") == ["a", "é"]
    with pytest.raises(InputError, match=r"shape \[1, 2\]"):
        kserve.texts(array.reshape(1, 2), "text")
    with pytest.raises(InputError, match="datatype INT64, not BYTES"):
        kserve.texts(np.zeros(2, np.int64), "text")


@pytest.mark.parametrize("datatype, dtype", kserve.NUMBERS.items())
def test_every_datatype_comes_in_binary_and_in_json(datatype: str, dtype: np.dtype) -> None:
    values = np.array([[1, 0, 1]]).astype(dtype)
    entry = request(name="x", shape=[1, 3], datatype=datatype)
    entry["inputs"][0] |= {"parameters": {"binary_data_size": values.nbytes}}
    del entry["inputs"][0]["data"]
    assert np.array_equal(read(entry, values.tobytes()).inputs["x"], values)
    data = values.tolist() if dtype.kind != "f" else [[1.0, 0.0, 1.0]]
    again = read(request(name="x", shape=[1, 3], datatype=datatype, data=data)).inputs["x"]
    assert again.dtype == dtype and np.array_equal(again, values)


def test_tensors_follow_the_json_in_their_order() -> None:
    ids = np.arange(6, dtype="<i8").reshape(2, 3)
    texts = strings(b"", "日本".encode())
    message = {
        "id": "7",
        "inputs": [
            {
                "name": "a",
                "shape": [2],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(texts)},
            },
            {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["between"]},
            {
                "name": "c",
                "shape": [2, 3],
                "datatype": "INT64",
                "parameters": {"binary_data_size": 48},
            },
        ],
        "parameters": {"binary_data_output": True, "other": 1},
        "outputs": [{"name": "x"}, {"name": "y", "parameters": {"binary_data": False}}],
    }
    answer = read(message, texts + ids.tobytes())
    assert kserve.texts(answer.inputs["a"], "a") == ["", "日本"]
    assert answer.inputs["b"].tolist() == [b"between"]
    assert np.array_equal(answer.inputs["c"], ids)
    assert answer.id == "7" and answer.parameters["other"] == 1
    assert answer.outputs == (Asked("x", True), Asked("y", False))


def test_all_outputs_are_wanted_where_none_is_named() -> None:
    assert kserve.wanted(read(request()), ("x", "y")) == (Asked("x", False), Asked("y", False))
    message = {**request(), "outputs": [{"name": "embeding"}]}
    with pytest.raises(InputError, match=r"'embeding' is unknown.*did you mean 'embedding'"):
        kserve.wanted(read(message), ("embedding",))


@pytest.mark.parametrize("binary", [False, True])
def test_an_answer_has_its_tensors_in_json_or_behind_it(binary: bool) -> None:
    outputs = {
        "numbers": np.array([[0.5, -1.25]], np.float32),
        "words": np.array(["é", b"b"], object),
        "halves": np.array([0.5], np.float16),
        "left": np.zeros(9, np.float32),
    }
    message = {**request(), "id": "an id"}
    asked = [Asked(name, binary) for name in ("words", "numbers", "halves")]
    body, length = kserve.answer("minilm", read(message), asked, outputs)
    header = json.loads(body[:length] if binary else body)
    assert header["model_name"] == "minilm" and header["id"] == "an id"
    entries = {entry["name"]: entry for entry in header["outputs"]}
    assert list(entries) == ["words", "numbers", "halves"]
    assert entries["numbers"]["datatype"] == "FP32" and entries["numbers"]["shape"] == [1, 2]
    assert entries["words"]["datatype"] == "BYTES" and entries["halves"]["datatype"] == "FP16"
    if not binary:
        assert length is None and entries["words"]["data"] == ["é", "b"]
        assert entries["numbers"]["data"] == [0.5, -1.25] and entries["halves"]["data"] == [0.5]
        return
    pieces = strings("é".encode(), b"b"), struct.pack("<2f", 0.5, -1.25), b"\x00\x38"
    assert body[length:] == b"".join(pieces)
    sizes = [entry["parameters"]["binary_data_size"] for entry in header["outputs"]]
    assert sizes == [len(piece) for piece in pieces]


@pytest.mark.parametrize(
    "message, words",
    [
        ([], "no JSON object"),
        ({}, "no list of inputs"),
        ({"inputs": []}, "no list of inputs"),
        ({"inputs": ["x"]}, "an input has no name"),
        ({"inputs": request()["inputs"] * 2}, "'text' is there twice"),
        ({**request(), "id": 7}, "id of the request is no string"),
        ({**request(), "parameters": []}, "parameters of the request is no object"),
        ({**request(), "outputs": {}}, "outputs of the request are no list"),
        ({**request(), "outputs": [{}]}, "an output has no name"),
        ({**request(), "parameters": {"binary_data_output": 1}}, "neither true nor false"),
        (
            {**request(), "outputs": [{"name": "x", "parameters": {"classification": 3}}]},
            "as a classification",
        ),
        (request(shape=None), "no list of whole numbers"),
        (request(shape=[-1]), "no list of whole numbers"),
        (request(shape=[True, 2]), "no list of whole numbers"),
        (request(shape=[1.5]), "no list of whole numbers"),
        (request(shape=[2**60, 2**60]), "its data 2 elements"),
        (request(shape=[3]), r"the shape \[3\], its data 2 elements"),
        (request(data=[["a"], ["b"]], shape=[1, 2]), r"the shape \[1, 2\], its data \[2, 1\]"),
        (request(datatype="STRING"), "'STRING'.*known: BYTES, BOOL"),
        (request(datatype=["BYTES"]), "has the datatype"),
        (request(data=None), "is no list"),
        (request(data="ab"), "is no list"),
        (request(data=["a", 1]), "has what is no string"),
        (request(data=[["a"], ["b", "c"]]), "has what is no string|is no tensor"),
        (request(datatype="INT64", data=["1", "2"]), "not of the datatype INT64"),
        (request(datatype="INT64", data=[1, 2.5]), "not of the datatype INT64"),
        (request(datatype="INT64", data=[1, None]), "not of the datatype INT64"),
        (request(datatype="INT64", data=[1, 2**63]), "INT64"),
        (request(datatype="INT64", data=[1, 2**70]), "INT64"),
        (request(datatype="INT8", data=[1, 200]), "too large for INT8"),
        (request(datatype="UINT8", data=[1, -1]), "too large for UINT8"),
        (request(datatype="BOOL", data=[0, 1]), "not of the datatype BOOL"),
        (request(datatype="INT64", data=[[1], [2, 3]]), "is no tensor"),
        (request(parameters={"binary_data_size": 5}, data=None), "5 bytes, 0 are there"),
        (request(parameters={"binary_data_size": -1}, data=None), "-1 bytes"),
        (request(parameters={"binary_data_size": "4"}, data=None), "'4' bytes"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(message: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(message)


@pytest.mark.parametrize(
    "entry, tail, words",
    [
        ({"shape": [1], "datatype": "INT64"}, b"1234567", "no whole number of elements"),
        ({"shape": [2], "datatype": "INT64"}, b"12345678", "its data 1 elements"),
        ({"shape": [1], "datatype": "BYTES"}, b"\x05\x00\x00\x00abc", "the middle of an element"),
        ({"shape": [1], "datatype": "BYTES"}, b"\x05\x00", "the middle of an element"),
    ],
)
def test_broken_binary_tensors_are_refused(entry: dict, tail: bytes, words: str) -> None:
    entry = {"name": "x", "parameters": {"binary_data_size": len(tail)}, **entry}
    with pytest.raises(InputError, match=words):
        read({"inputs": [entry]}, tail)


def test_bytes_behind_the_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="3 bytes follow"):
        read(request(), b"abc")


@pytest.mark.parametrize("length", ["-1", "x", "99999", "²", ""])
def test_a_header_that_says_no_length_is_refused(length: str) -> None:
    with pytest.raises(InputError, match="inference-header-content-length"):
        kserve.read(b"{}", length)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InputError, match="no JSON"):
        kserve.read(body)


def test_compressed_bodies_are_read_up_to_a_limit() -> None:
    text = b"a text" * 100
    assert kserve.plain(gzip.compress(text), "gzip", 600) == text
    assert kserve.plain(zlib.compress(text), "deflate", 600) == text
    for body, encoding, words in (
        (gzip.compress(text), "br", "known: gzip, deflate"),
        (gzip.compress(b"a" * 10**7), "gzip", "more than 600 bytes"),
        (gzip.compress(text)[:-9], "gzip", "in the middle"),
        (text, "gzip", "is not encoded by gzip"),
        (b"", "deflate", "in the middle"),
    ):
        with pytest.raises(InputError, match=words):
            kserve.plain(body, encoding, 600)


def test_texts_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        kserve.texts(np.array([b"\xff"], object), "text")


def test_ids_are_those_that_the_mask_leaves() -> None:
    ids = np.array([[101, 7, 102, 0], [101, 102, 0, 0], [101, 5, 6, 102]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    assert kserve.token_ids(inputs) == [[101, 7, 102], [101, 102], [101, 5, 6, 102]]
    with pytest.raises(InputError, match="token_type_ids are not zero"):
        kserve.token_ids({**inputs, "token_type_ids": mask})
    assert kserve.token_ids({"input_ids": ids.astype(np.int32)}) == ids.tolist()


@pytest.mark.parametrize(
    "ids, mask, words",
    [
        (np.zeros(3, np.int64), None, r"INT64 \[3\], not INT64 \[n, length\]"),
        (np.zeros((1, 3), np.float32), None, "is FP32"),
        (np.zeros((1, 3), np.int64), np.ones((3, 1), np.int64), r"\[3, 1\], input_ids is \[1, 3\]"),
        (np.zeros((1, 3), np.int64), np.array([[1, 0, 1]]), "zeros behind them"),
        (np.zeros((1, 3), np.int64), np.array([[0, 1, 1]]), "zeros behind them"),
        (np.zeros((1, 3), np.int64), np.array([[1, 2, 0]]), "zeros behind them"),
    ],
)
def test_ids_without_a_text_in_each_row_are_refused(ids, mask, words: str) -> None:
    inputs = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
    with pytest.raises(InputError, match=words):
        kserve.token_ids(inputs)
