"""llama.cpp as a peer: its file has the model's weights, it answers what float32 answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertile.base.errors import ModelError
from bertile.bench import llamacpp, peers
from bertile.bench.engines import Engine, Source
from bertile.bench.sameness import compared
from bertile.bench.traffic import Traffic, drive
from bertile.config import Config
from bertile.export import cached
from bertile.export.sentence_modules import Chain, Dense, Normalize, Pool, Splade
from bertile.onnx.exported import ExportedModel
from bertile.onnx.samples import run_onnx, sample


@pytest.fixture(scope="module")
def embedding(stages: str) -> ExportedModel:
    """The two-layer model that gives one vector of a text."""
    return cached.export_cached("synthetic:bert-tiny:embedding", Config(cache_dir=stages))


def request(exported: ExportedModel, batch: int, length: int) -> dict[str, np.ndarray]:
    """Some ids and padding; llama.cpp knows the first token type alone."""
    inputs = sample(exported.inputs, batch, length, padding_id=0)
    return {**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])}


def opened(precision: str, exported: ExportedModel, tmp_path: Path) -> tuple[Any, str]:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    path = tmp_path / llamacpp.NAME
    llamacpp.write(precision, exported, path)
    source = Source(Path(), path, outputs=exported.outputs)
    return peers.OPENERS["llamacpp"](Engine("llamacpp", "llamacpp", precision, source), 1)


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("fp32", 0.99999, 1.0001), ("int8", 0.995, 0.99999), ("int4", 0.8, 0.999)],
)
def test_answers_are_those_of_the_model(
    exported: ExportedModel, tmp_path: Path, precision: str, least: float, most: float
) -> None:
    infer, version = opened(precision, exported, tmp_path)
    assert version.startswith("llama.cpp 20")
    inputs = request(exported, 3, 24)
    want = list(run_onnx(exported.onnx_path, inputs).values())
    got = infer(inputs)
    assert [array.shape for array in got] == [array.shape for array in want]
    assert least < compared(want, got, inputs)["cosine"] < most


def test_vectors_of_texts_are_pooled_and_normalized(
    embedding: ExportedModel, tmp_path: Path
) -> None:
    infer, _ = opened("fp32", embedding, tmp_path)
    inputs = request(embedding, 3, 24)
    (want,) = run_onnx(embedding.onnx_path, inputs).values()
    assert np.abs(infer(inputs)[0] - want).max() < 1e-3


def test_callers_at_once_have_a_context_each(exported: ExportedModel, tmp_path: Path) -> None:
    infer, _ = opened("fp32", exported, tmp_path)
    requests = [request(exported, 1, length) for length in (8, 16)]
    wanted = [infer(inputs)[0] for inputs in requests]

    def check(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        got = infer(inputs)[0]
        np.testing.assert_allclose(got, wanted[inputs["input_ids"].shape[1] // 16], atol=1e-5)
        return [got]

    assert len(drive(check, requests, Traffic(callers=3, count=12)).milliseconds) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "roberta"}, "family 'bert' alone"),
        ({"source": "my.onnx"}, "checkpoints of the family"),
        ({"outputs": ("logits",)}, "vectors of tokens and texts, not logits"),
    ],
)
def test_models_that_it_cannot_compute_are_refused(
    exported: ExportedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    message: str,
) -> None:
    monkeypatch.setattr(llamacpp, "require", lambda *names: (None,))
    with pytest.raises(ModelError, match=message):
        llamacpp.write("fp32", dataclasses.replace(exported, **change), tmp_path / "x.gguf")


def test_embedding_that_it_cannot_compute_is_refused() -> None:
    assert llamacpp._pooling(None) == ("NONE", False)
    assert llamacpp._pooling(Chain()) == ("MEAN", True)
    assert llamacpp._pooling(Chain((Pool(("cls",)),))) == ("CLS", False)
    for steps, message in (
        ((Pool(("max",)),), "no pooling of the kind 'max'"),
        ((Pool(("cls", "mean")),), r"no pooling of the kind 'cls \+ mean'"),
        ((Pool(), Dense(Path())), "or computes more of it than its length"),
        ((Splade(),), "no embedding of that kind"),
        ((Normalize(),), "no embedding of that kind"),
    ):
        with pytest.raises(ModelError, match=message):
            llamacpp._pooling(Chain(steps))
