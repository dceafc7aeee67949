"""Rerankers made of a decoder's words for yes and no, as sentence-transformers computes them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from helpers import sentence_models as tiny

import bertile
from bertile.base.errors import ModelError, UsageError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import cached, checkpoints, sentence_modules
from bertile.families.family import CAUSAL
from bertile.families.table import FAMILIES
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


@pytest.mark.parametrize("no", [BAD, pytest.param(None, marks=pytest.mark.slow)])
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
    tensors = onnx.load(graph.onnx_path).graph.initializer
    heads = [t for t in tensors if sorted(t.dims) == [1 if no is None else 2, tiny.WIDTH]]
    whole = [t for t in tensors if len(t.dims) == 2 and 1000 in t.dims]
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
    checkpoint = checkpoints.load(str(path))
    assert any("chat template" in note for note in checkpoint.notes)
    assert "tokenizer.json" not in {file.name for file in checkpoint.files}


def test_score_of_anything_else_is_refused(tmp_path):
    _, path = reranker(tmp_path)
    place = path / "modules.json"
    listed = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps(listed[1:]), encoding="utf-8")
    with pytest.raises(ModelError, match="has LogitScore for no task"):
        sentence_modules.chain_of(path)


def causal(directory, model_type="qwen3"):
    """A decoder as transformers saves it, with a tokenizer; what transformers makes of a batch."""
    path = tiny.transformer(directory / "model", "causal-lm", model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()

    def last_logits(arrays):
        with torch.no_grad():
            logits = model(**{name: torch.tensor(a) for name, a in arrays.items()}).logits.numpy()
        width = arrays["attention_mask"].shape[1]
        last = width - 1 - arrays["attention_mask"][:, ::-1].argmax(1)
        return logits[np.arange(len(logits)), last]

    return path, last_logits


def padded(rows, side):
    """Ids and mask of rows of several lengths."""
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for place, row in enumerate(rows):
        part = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[place, part], mask[place, part] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [[5, 6, 7, 13, 14, 9, 30], [6], [8, 9, 10, 11]]
ASKED = Config(head="causal-lm", labels=("good", "bad", "#6"))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family.name, marks=[pytest.mark.slow] if family.kernels_of else [])
        for family in FAMILIES
        if CAUSAL in family.heads
    ],
)
def test_words_have_their_logits_at_the_last_token_however_rows_are_padded(tmp_path, family):
    path, last_logits = causal(tmp_path, family)
    graph = cached.export_cached(
        str(path), Config(**{**ASKED.to_dict(), "cache_dir": str(tmp_path / "cache")})
    )
    assert (graph.head, graph.labels) == ("sequence-classification", ASKED.labels)
    for side in ("left", "right"):
        want = last_logits(padded(ROWS, side))[:, [GOOD, BAD, 6]]
        got = run_onnx(graph.onnx_path, padded(ROWS, side))["logits"]
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert (graph.directory / "tokenizer.json").exists()


@pytest.mark.slow
def test_bundle_scores_texts_by_words(tmp_path):
    path, last_logits = causal(tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    config = Config(**{**ASKED.to_dict(), "cache_dir": str(tmp_path / "cache")})
    bertile.compile(str(path), tmp_path / "bundle", config)
    bundle = bertile.load(tmp_path / "bundle")
    want = last_logits(padded(ROWS, "right"))[:, [GOOD, BAD, 6]]
    assert bundle.manifest["model"]["labels"] == list(ASKED.labels)
    for side in ("left", "right"):
        np.testing.assert_allclose(bundle(**padded(ROWS, side))["logits"], want, atol=1e-4)
    with bertile.open(tmp_path / "bundle") as model:
        (answer,) = model.classify(["the cat sat"])
    ids = transformers.AutoTokenizer.from_pretrained(path)("the cat sat")["input_ids"]
    logits = last_logits(padded([ids], "right"))[0, [GOOD, BAD, 6]]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert answer["label"] == ASKED.labels[int(shares.argmax())]
    assert abs(answer["score"] - shares.max()) < 1e-4


@pytest.mark.parametrize(
    ("labels", "head", "message"),
    [
        (("catmat",), "causal-lm", "the label 'catmat' is no token but"),
        (("#1000",), "causal-lm", "the model has 1000 ids"),
        (("good",), "encoder", "--labels are words of a decoder's, not of the head 'encoder'"),
    ],
)
def test_label_that_is_no_token_of_a_decoder_is_refused(tmp_path, labels, head, message):
    path, _ = causal(tmp_path)
    config = Config(head=head, labels=labels, cache_dir=str(tmp_path / "cache"))
    with pytest.raises((ModelError, UsageError), match=message):
        cached.export_cached(str(path), config)


def test_labels_of_an_onnx_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match="for a checkpoint of a decoder"):
        bertile.compile("model.onnx", tmp_path / "out", Config(labels=("yes", "no")))
