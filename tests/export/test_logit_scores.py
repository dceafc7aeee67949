"""Rerankers made of a decoder's words for yes and no, as sentence-transformers computes them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from helpers import sentence_models as tiny

import bertile
from bertile.base.errors import ModelError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import cached, sentence_modules
from bertile.onnx.samples import run_onnx

library = pytest.importorskip("sentence_transformers")
base = pytest.importorskip("sentence_transformers.base.modules")
scores = pytest.importorskip("sentence_transformers.cross_encoder.modules")
GOOD, BAD = tiny.WORDS.index("good"), tiny.WORDS.index("bad")
QUERY = "a good movie"
PAIRS = [(QUERY, text) for text in ("The cat sat.", "a bad movie, a bad bad end", "mat")]


def reranker(directory, *, model_type="qwen3", no=BAD):
    """A tiny one, and the directory that it saves."""
    place = tiny.transformer(directory / "base", "causal-lm", model_type)
    with quiet():
        model = library.CrossEncoder(
            modules=[
                base.Transformer(str(place), transformer_task="text-generation"),
                scores.LogitScore(GOOD, no),
            ],
            device="cpu",
        )
        model.save_pretrained(str(directory / "model"))
    return model, directory / "model"


def exported(path, tmp_path):
    return cached.export_cached(str(path), Config(cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("no", [BAD, None])
def test_logit_is_that_of_the_library_however_rows_are_padded(tmp_path, no):
    model, path = reranker(tmp_path, no=no)
    graph = exported(path, tmp_path)
    assert (graph.head, graph.outputs, graph.labels) == (
        "sequence-classification",
        ("logits",),
        ("LABEL_0",),
    )
    features = model.preprocess(PAIRS)
    with torch.no_grad():
        want = model(dict(features))["scores"].numpy()
    ids, mask = features["input_ids"].numpy(), features["attention_mask"].numpy()
    assert not mask.all(), "some row is padded"
    for order in ("left", "right"):
        if order == "right":
            rolls = [int(row.argmax()) for row in mask]
            ids, mask = (
                np.stack([np.roll(row, -roll) for row, roll in zip(array, rolls)])
                for array in (ids, mask)
            )
        got = run_onnx(graph.onnx_path, {"input_ids": ids, "attention_mask": mask})["logits"]
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_only_the_rows_of_both_words_are_kept(tmp_path):
    _, path = reranker(tmp_path)
    graph = onnx.load(exported(path, tmp_path).onnx_path).graph
    heads = [t for t in graph.initializer if sorted(t.dims) == [2, tiny.WIDTH]]
    whole = [t for t in graph.initializer if len(t.dims) == 2 and 1000 in t.dims]
    assert (len(heads), len(whole)) == (1, 1)  # the table of words, which is looked up


@pytest.mark.slow
@pytest.mark.parametrize("capped", [False, True])
def test_scores_of_texts_are_those_of_the_library(tmp_path, capped):
    """Also where the model bounds its logits, so that they are no product alone."""
    model, path = reranker(tmp_path, model_type="gemma2" if capped else "qwen3")
    bertile.compile(str(path), tmp_path / "bundle", Config(cache_dir=str(tmp_path / "cache")))
    with bertile.open(tmp_path / "bundle", threads=2) as bundle:
        np.testing.assert_allclose(bundle.predict(PAIRS), model.predict(PAIRS), atol=1e-5)
        ranked = [row["corpus_id"] for row in bundle.rank(QUERY, [text for _, text in PAIRS])]
    assert ranked == [r["corpus_id"] for r in model.rank(QUERY, [text for _, text in PAIRS])]


def test_texts_are_not_taken_where_a_chat_template_makes_them(tmp_path):
    _, path = reranker(tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    graph = exported(path, tmp_path)
    assert any("chat template" in note for note in graph.notes)
    assert not (graph.directory / "tokenizer.json").exists()


def test_score_of_anything_else_is_refused(tmp_path):
    _, path = reranker(tmp_path)
    place = path / "modules.json"
    listed = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(listed[1:]), encoding="utf-8")
    with pytest.raises(ModelError, match="has LogitScore for no task"):
        sentence_modules.chain_of(path)
