"""Requests: lengths by a distribution, padding, texts and arrays of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile.base.errors import UsageError
from bertile.bench import workloads
from bertile.config import Config
from bertile.export.cached import export_cached
from bertile.onnx.exported import ExportedModel

MANIFEST: dict[str, Any] = {
    "model": {"max_length": 64},
    "static": {"length": None},
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "below": 10, "default": None},
        {"name": "attention_mask", "dtype": "int64", "below": 2, "default": "ones"},
    ],
}


@pytest.mark.parametrize(
    ("text", "lengths", "shares"),
    [
        ("8-11", (8, 9, 10, 11), (0.25, 0.25, 0.25, 0.25)),
        ("16:0.5,128:1.5", (16, 128), (0.25, 0.75)),
        ("16, 32", (16, 32), (0.5, 0.5)),
        ("1-2:2,2", (1, 2), (1 / 3, 2 / 3)),
    ],
)
def test_mix_is_read(text: str, lengths: tuple, shares: tuple) -> None:
    mix = workloads.parse_mix(text)
    assert mix.lengths == lengths and mix.shares == pytest.approx(shares)


@pytest.mark.parametrize("text", ["", "a", "8-", "9-8", "0-4", "16:", "16:x", "16:0", "16;32"])
def test_other_mixes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lengths"):
        workloads.parse_mix(text)


def test_lengths_come_as_often_as_the_mix_says_in_a_random_order() -> None:
    lengths = workloads.parse_mix("16:0.75,32:0.25").draw(64, 1)
    assert (lengths == 16).sum() == 48 and (lengths == 32).sum() == 16
    assert lengths.tolist() != np.sort(lengths, axis=0).tolist()
    assert (workloads.parse_mix("16:0.75,32:0.25").draw(64, 1) == lengths).all()
    assert set(workloads.parse_mix("8-128").draw(1000, 1).flat) == set(range(8, 129))


def test_each_request_is_as_mixed_as_all_together() -> None:
    lengths = workloads.parse_mix("16:0.75,32:0.25").draw(6, 8)
    assert (lengths == 32).sum(axis=1).tolist() == [2] * 6
    assert {tuple(row) for row in lengths} != {tuple(np.sort(row)) for row in lengths}


def test_mixed_sequences_are_padded_to_the_longest_and_masked() -> None:
    workload = workloads.of_mix(MANIFEST, 16, workloads.parse_mix("3-8"))
    assert len(workload.requests) == 4 and workload.length == "3-8"
    ids, mask = (workload.requests[0][name] for name in ("input_ids", "attention_mask"))
    assert ids.shape == mask.shape and ids.dtype == np.int64
    assert not ids[mask == 0].any() and mask[:, 0].all() and mask.sum(1).max() == ids.shape[1]
    assert (np.diff(mask, axis=1) <= 0).all()
    assert workload.sizes == [(1, length) for length in mask.sum(1)]
    assert workload.tokens == np.mean([r["attention_mask"].sum() for r in workload.requests])


def test_single_sequences_have_no_padding() -> None:
    unmasked = {**MANIFEST, "inputs": MANIFEST["inputs"][:1]}
    workload = workloads.of_mix(unmasked, 1, workloads.parse_mix("3-8"))
    assert {request["input_ids"].shape for request in workload.requests} == {
        (1, length) for length in range(3, 9)
    }
    with pytest.raises(UsageError, match="no attention_mask"):
        workloads.of_mix(unmasked, 2, workloads.parse_mix("3-8"))


def test_request_of_one_size_is_full() -> None:
    workload = workloads.of_size(MANIFEST, 2, 8)
    assert workload.sizes == [(2, 8)] and workload.tokens == 16
    with pytest.raises(UsageError, match="at most 64 tokens"):
        workloads.of_size(MANIFEST, 1, 65)


def test_arrays_of_a_file_keep_their_order(exported: ExportedModel, tmp_path: Path) -> None:
    ids = np.arange(5)[:, None] + np.ones((5, 4), np.int64)
    np.savez(tmp_path / "mine.npz", input_ids=ids)
    workload = workloads.of_file(tmp_path / "mine.npz", exported, 2)
    assert [len(request["input_ids"]) for request in workload.requests] == [2, 2, 1]
    assert np.concatenate([r["input_ids"] for r in workload.requests]).tolist() == ids.tolist()
    assert workload.length == "mine.npz" and set(workload.requests[0]) == {
        spec.name for spec in exported.inputs
    }
    with pytest.raises(UsageError, match="there is no file"):
        workloads.of_file(tmp_path / "absent.txt", exported, 1)


def test_texts_of_a_file_become_ids_in_their_order(stages: str, tmp_path: Path) -> None:
    minilm = export_cached("minilm", Config(cache_dir=stages))
    (tmp_path / "queries.txt").write_text("yes yes yes\n\nno\nyes\nno no no\n")
    workload = workloads.of_file(tmp_path / "queries.txt", minilm, 1)
    lengths = [request["input_ids"].shape for request in workload.requests]
    assert lengths == [(1, 5), (1, 3), (1, 3), (1, 5)]  # with the marks at both ends
    assert workload.tokens == 4 and len(workload.of_each_shape) == 2
    padded = workloads.of_file(tmp_path / "queries.txt", minilm, 2)
    assert [request["attention_mask"].sum(1).tolist() for request in padded.requests] == [
        [5, 3],
        [3, 5],
    ]
