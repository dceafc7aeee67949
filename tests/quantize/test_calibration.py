"""Calibration files: texts and arrays become requests, anything else is refused in a sentence."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import BertileError, InputError, ModelError, UsageError
from bertile.config import Config
from bertile.export.cached import export_cached
from bertile.onnx.exported import ExportedModel, InputSpec
from bertile.quantize import calibration
from bertile.quantize.calibration import batches, read_requests, usual_requests

IDS = np.array([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]])


def model(directory: Path, names=("input_ids", "attention_mask"), **fields) -> ExportedModel:
    defaults = {"attention_mask": "ones", "token_type_ids": "zeros"}
    inputs = tuple(InputSpec(n, below=1000, default=defaults.get(n)) for n in names)
    fields = {"max_length": 512, **fields}
    return ExportedModel(
        directory, "m", "", "bert", "encoder", inputs=inputs, outputs=("x",), **fields
    )


@pytest.fixture(scope="module")
def minilm(stages) -> ExportedModel:
    return export_cached("minilm", Config(cache_dir=stages))


def written(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_texts_become_the_ids_of_the_models_own_tokenizer(minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.directory)
    texts = ["A first sentence.", "Yes", "One that is rather longer than both of the others."]
    (tmp_path / "texts.txt").write_text("\n".join([texts[0], "", texts[1], texts[2]]) + "\n")
    (request,) = read_requests(tmp_path / "texts.txt", minilm)
    want = tokenizer([texts[1], texts[0], texts[2]], padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(request[name], want[name])


def test_a_text_that_is_too_long_is_cut(minilm, tmp_path):
    (tmp_path / "texts.txt").write_text("word " * 2000)
    (request,) = read_requests(tmp_path / "texts.txt", dataclasses.replace(minilm, length=40))
    assert request["input_ids"].shape == (1, 40)


def test_of_a_long_file_some_lines_are_taken_evenly(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SEQUENCES", 3)
    (tmp_path / "texts.txt").write_text("".join("yes " * n + "\n" for n in range(1, 10)))
    requests = read_requests(tmp_path / "texts.txt", minilm)
    assert [request["attention_mask"].sum(1).tolist() for request in requests] == [[3, 7, 11]]


def test_arrays_are_taken_as_they_are_and_filled_in(tmp_path):
    path = written(tmp_path / "a.npz", input_ids=IDS)
    names = ("input_ids", "attention_mask", "token_type_ids")
    (request,) = read_requests(path, model(tmp_path, names))
    np.testing.assert_array_equal(request["input_ids"], IDS)
    assert (request["attention_mask"] == 1).all() and (request["token_type_ids"] == 0).all()
    assert {array.dtype.name for array in request.values()} == {"int64"}


def test_sequences_are_joined_by_length():
    rows = [{"input_ids": np.ones(n), "attention_mask": np.ones(n)} for n in (9, 3, 30, 3, 4)]
    joined = batches(rows, model(Path(), batch=None))
    assert [request["input_ids"].shape for request in joined] == [(5, 30)]
    assert joined[0]["attention_mask"].sum(1).tolist() == [3, 3, 4, 9, 30]


def test_model_without_mask_is_given_no_padding():
    rows = [{"input_ids": np.full(n, n)} for n in (9, 3, 30, 3)]
    joined = batches(rows, model(Path(), ("input_ids",)))
    assert [request["input_ids"].shape for request in joined] == [(2, 3), (1, 9), (1, 30)]
    with pytest.raises(InputError, match="has 3 tokens, the model takes exactly 16"):
        batches(rows, model(Path(), ("input_ids",), length=16))


def test_static_shape_is_filled_up():
    rows = [{"input_ids": np.full(n, n), "attention_mask": np.ones(n)} for n in (2, 5, 4)]
    first, last = batches(rows, model(Path(), batch=2, length=6))
    np.testing.assert_array_equal(first["input_ids"], [[2, 2, 0, 0, 0, 0], [4, 4, 4, 4, 0, 0]])
    np.testing.assert_array_equal(last["attention_mask"], [[1] * 5 + [0]] * 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "there is no calibration file"),
        ("empty.txt", b" \n\n", "has no text; write one text a line"),
        ("picture.png", b"\x89PNG\xff\xd8", "is not UTF-8 text"),
        ("broken.npz", b"not a zip", "is not an .npz file of arrays"),
    ],
)
def test_files_that_are_neither_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_requests(tmp_path / name, model(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, "the model has no input 'ids'; known: input_ids"),
        ({"input_ids": IDS.astype("float32")}, "has dtype float32"),
        ({"input_ids": IDS + 1000}, "the model takes 0 to 999"),
        ({"input_ids": IDS[0]}, "has 1 dimension"),
        ({"attention_mask": IDS}, "input_ids is missing"),
    ],
)
def test_arrays_that_the_model_cannot_take_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        read_requests(written(tmp_path / "a.npz", **arrays), model(tmp_path))


def test_texts_for_a_model_without_tokenizer_are_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("A text.\n")
    with pytest.raises(ModelError, match=r"no tokenizer.json; give an .npz of its inputs"):
        read_requests(tmp_path / "texts.txt", model(tmp_path))


def test_without_a_file_there_are_sentences_or_random_ids(minilm, tmp_path):
    sentences = usual_requests(minilm)
    assert sum(len(request["input_ids"]) for request in sentences) == 64
    assert all((request["input_ids"][:, 0] == 101).all() for request in sentences)  # [CLS]
    random = usual_requests(model(tmp_path, max_length=20))
    assert {request["input_ids"].shape for request in random} == {(8, 20)}


def test_every_refusal_is_an_error_of_ours(tmp_path):
    for path in (tmp_path, tmp_path / "absent.npz"):
        with pytest.raises(BertileError):
            read_requests(path, model(tmp_path))


def claiming(path: Path, shape: tuple[int, ...], zeros: int) -> Path:
    """An .npz whose array says that it has this shape, and has so many zeros."""
    header = repr({"descr": "<i8", "fortran_order": False, "shape": shape})
    text = header.ljust(117) + "\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("input_ids.npy", "w", force_zip64=True) as file:
            file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
            for _ in range(0, zeros, 1 << 20):
                file.write(bytes(8 * min(zeros, 1 << 20)))
    return path


@pytest.mark.parametrize("shape", [(2**31, 1), (-1, 4), (3, 2**62), (2, 1)])
def test_arrays_that_say_more_than_they_have_are_refused(tmp_path, shape):
    with pytest.raises(UsageError, match="has not the size that it says"):
        read_requests(claiming(tmp_path / "a.npz", shape, 4), model(tmp_path))


def test_arrays_of_more_numbers_than_anyone_needs_are_refused(tmp_path, monkeypatch):
    path = claiming(tmp_path / "a.npz", (1 << 20, 4), 1 << 22)
    monkeypatch.setattr(np, "load", None)  # nothing is read
    monkeypatch.setattr(calibration, "MOST_NUMBERS", (1 << 22) - 1)
    with pytest.raises(UsageError, match="holds 4,194,304 numbers, more than 4,194,303; 512 seq"):
        read_requests(path, model(tmp_path))
