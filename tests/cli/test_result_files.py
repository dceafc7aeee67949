"""Files of answers: read back by numpy, scipy and json, whole or stopped in the middle."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bertile.base.errors import BertileError, UsageError
from bertile.cli import result_files
from bertile.cli.result_files import Form, Npy, ResultFile, as_json
from bertile.text import SparseVector

ROWS = np.random.default_rng(0).standard_normal((1300, 5)).astype(np.float32)
VECTORS = Form("rows", "embeddings")


def write(path: Path, form: Form, arrays, stop: BaseException | None = None) -> None:
    with ResultFile(str(path), form) as file:
        for number, array in enumerate(arrays):
            file.write({"number": number}, array)
        if stop is not None:
            raise stop


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint8])
def test_rows_come_back_from_npy_and_npz(tmp_path, dtype) -> None:
    rows = ROWS.astype(dtype)
    write(tmp_path / "x.npy", VECTORS, rows)
    array = np.load(tmp_path / "x.npy")
    assert array.dtype == dtype and np.array_equal(array, rows)
    write(tmp_path / "x.npz", Form("rows", "scores", {"labels": np.asarray(["a", "bc"])}), rows)
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["scores"], rows) and list(arrays["labels"]) == ["a", "bc"]


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.jsonl"])
def test_what_is_written_before_an_end_stays(tmp_path, name) -> None:
    for stop in (KeyboardInterrupt(), SystemExit(143), UsageError("wrong")):
        (tmp_path / name).write_bytes(b"older and much longer" * 10_000)
        with pytest.raises(type(stop)):
            write(tmp_path / name, VECTORS, ROWS[:7], stop)
        if name == "x.jsonl":
            lines = (tmp_path / name).read_text().splitlines()
            assert [json.loads(line)["number"] for line in lines] == list(range(7))
        else:
            array = np.load(tmp_path / name)
            assert np.array_equal(array if name == "x.npy" else array["embeddings"], ROWS[:7])
    assert os.listdir(tmp_path) == [name]


def test_an_npy_that_nobody_closes_has_its_rows_but_the_last() -> None:
    """As after a kill: the header is stamped now and then."""
    file = io.BytesIO()
    npy = Npy(file)
    for row in ROWS:
        npy.write({}, row)
    file.seek(0)
    array = np.load(file)
    assert len(array) == 1024 and np.array_equal(array, ROWS[:1024])


def test_shape_of_any_size_fits_the_header() -> None:
    npy = Npy(io.BytesIO())
    npy.extend(np.zeros((0, 1 << 20), np.float32))
    npy._count = 1 << 40
    header = io.BytesIO(npy._header())
    assert np.lib.format.read_magic(header) == (1, 0)
    assert np.lib.format.read_array_header_1_0(header)[0] == (1 << 40, 1 << 20)
    assert header.tell() == result_files.HEADER


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.jsonl"])
def test_without_an_answer_there_is_no_file_and_an_older_stays(tmp_path, name) -> None:
    with pytest.raises(UsageError):
        write(tmp_path / name, VECTORS, [], UsageError("wrong"))
    assert os.listdir(tmp_path) == []
    (tmp_path / name).write_text("older")
    with pytest.raises(UsageError):
        write(tmp_path / name, VECTORS, [], UsageError("wrong"))
    assert (tmp_path / name).read_text() == "older"


def test_vectors_of_tokens_come_back_with_their_starts(tmp_path) -> None:
    texts = [ROWS[:3], ROWS[3:10], ROWS[10:11]]
    write(tmp_path / "x.npz", Form("tokens", "features"), texts)
    with np.load(tmp_path / "x.npz") as arrays:
        starts = arrays["starts"]
        assert starts.tolist() == [0, 3, 10, 11]
        assert np.array_equal(arrays["features"][starts[1] : starts[2]], texts[1])


def test_sparse_vectors_come_back_as_a_matrix_of_scipy(tmp_path) -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="the reader to compare with")
    dense = np.maximum(ROWS[:20], 0)
    dense[3] = 0
    write(tmp_path / "x.npz", Form("sparse"), [SparseVector.of(row) for row in dense])
    matrix = sparse.load_npz(tmp_path / "x.npz")
    assert np.array_equal(matrix.toarray(), dense)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("x.txt", VECTORS, "is no file of answers; name it .npy, .npz, .jsonl"),
        ("x", VECTORS, "is no file of answers; name it .npy, .npz, .jsonl"),
        ("x.npy", Form("tokens", "features"), ".npy cannot hold these answers; name it .npz, .js"),
        ("x.npz", Form("none"), ".npz cannot hold these answers; name it .jsonl"),
    ],
)
def test_files_that_cannot_hold_the_answers_are_refused(tmp_path, name, form, message) -> None:
    with pytest.raises(UsageError) as caught:
        write(tmp_path / name, form, [])
    assert message in str(caught.value) and os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_named(tmp_path) -> None:
    (tmp_path / "x.npy").mkdir()
    for path, reason in (
        (tmp_path / "none" / "x.npy", "No such file or directory"),
        (tmp_path / "x.npy", "Is a directory"),
        (Path("/proc/x.jsonl"), "No such file or directory"),  # which root may not write either
    ):
        with pytest.raises(BertileError, match=f"cannot write '{path}': {reason}; choose another"):
            write(path, VECTORS, ROWS)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with pytest.raises(BertileError, match=r"cannot write '.*x\.jsonl': "):
        write(tmp_path / "x.jsonl", VECTORS, ROWS)


def test_json_has_all_digits_of_float32_and_no_more() -> None:
    line = as_json({"embedding": ROWS[0], "score": np.float32(0.1), "letters": "grün"})
    record = json.loads(line)
    assert np.array_equal(np.asarray(record["embedding"], np.float32), ROWS[0])
    assert np.float32(record["score"]) == np.float32(0.1)
    assert len(line) < 5 * 14 + 60 and "grün" in line and "\n" not in line
    assert json.loads(as_json({"rows": ROWS[:2]}))["rows"][1] == record_of(ROWS[1])


def record_of(row: np.ndarray) -> list[float]:
    return json.loads(as_json({"row": row}))["row"]
