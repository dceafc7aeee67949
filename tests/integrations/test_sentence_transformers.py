"""Bundles in sentence-transformers' models answer as the models that they were made of."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import originals, tiny_encoder

pytest.importorskip("sentence_transformers", reason="what is compared needs it")
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

import bertile
from bertile import loader
from bertile.base.errors import UsageError
from bertile.config import Config
from bertile.integrations.sentence_transformers import BertileTransformer

PROMPTS = {"query": "query: ", "document": "", "cat": "the cat "}
TEXTS = originals.TEXTS
WIDTH = originals.SIZES["hidden_size"]


@pytest.fixture
def computed(monkeypatch):
    monkeypatch.setattr(loader, "load", originals.load)


def encoder(directory: Path, **choices: Any) -> SentenceTransformer:
    """The original of an embedding, saved in its directory and loaded from there."""
    base = originals.save(directory / "base", "encoder")
    modules = [Transformer(str(base)), Pooling(WIDTH, "mean"), Normalize()]
    SentenceTransformer(modules=modules, **choices).save(str(directory / "model"))
    return SentenceTransformer(str(directory / "model"))


def classifier(directory: Path, labels: tuple[str, ...], **choices: Any) -> CrossEncoder:
    base = originals.save(directory / "base", "sequence-classification", labels)
    CrossEncoder(str(base), **choices).save(str(directory / "model"))
    return CrossEncoder(str(directory / "model"))


def splade(directory: Path) -> SparseEncoder:
    base = originals.save(directory / "base", "masked-lm")
    modules = [Transformer(str(base), transformer_task="fill-mask"), SpladePooling("max")]
    return SparseEncoder(modules=modules)


def module(directory: Path, head: str, **choices: Any) -> BertileTransformer:
    """The module of a bundle of the directory's model."""
    saved = directory / "model"
    original = saved if saved.exists() else directory / "base"
    return BertileTransformer(originals.compute(original, directory / "bundle", head), **choices)


def reloaded(model: Any, directory: Path) -> Any:
    model.save(str(directory))
    return type(model)(str(directory), trust_remote_code=True)


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_encodes_as_the_original(computed, tmp_path):
    theirs = encoder(tmp_path, prompts=PROMPTS, default_prompt_name="cat", similarity_fn_name="dot")
    ours = SentenceTransformer(modules=[module(tmp_path, "embedding")])
    for model in (ours, reloaded(ours, tmp_path / "saved")):
        for options in ({}, {"prompt_name": "query"}, {"prompt": "a dog "}, {"truncate_dim": 8}):
            close(model.encode(TEXTS, **options), theirs.encode(TEXTS, **options))
        close(model.encode(TEXTS[0]), theirs.encode(TEXTS[0]))
        close(model.encode_query(TEXTS[:2]), theirs.encode_query(TEXTS[:2]))
        vectors = theirs.encode(TEXTS)
        close(model.similarity(vectors, 2 * vectors), theirs.similarity(vectors, 2 * vectors))
        assert model.encode([]).shape == theirs.encode([]).shape
        assert model.prompts == theirs.prompts and model.default_prompt_name == "cat"
        assert model.similarity_fn_name == "dot"
        assert model.get_embedding_dimension() == theirs.get_embedding_dimension() == WIDTH
        assert model.max_seq_length == theirs.max_seq_length == originals.LONGEST
        assert model.tokenizer.tokenize("a catty") == theirs.tokenizer.tokenize("a catty")


def test_what_is_asked_for_goes_before_what_the_directory_says(computed, tmp_path):
    encoder(tmp_path, prompts=PROMPTS, default_prompt_name="cat", truncate_dim=8)
    bundled = module(tmp_path, "embedding")
    ours = SentenceTransformer(modules=[bundled])
    assert ours.truncate_dim == 8 and ours.encode("dog").shape == (8,)
    ours = SentenceTransformer(
        modules=[bundled],
        prompts={"query": "a: "},
        default_prompt_name="query",
        similarity_fn_name="manhattan",
        truncate_dim=4,
    )
    assert ours.prompts == {**PROMPTS, "query": "a: "} and ours.default_prompt_name == "query"
    assert ours.similarity_fn_name == "manhattan" and ours.truncate_dim == 4
    ours.prompts["cat"] = ""
    again = reloaded(ours, tmp_path / "saved")
    assert again.prompts == {**PROMPTS, "query": "a: ", "cat": ""}


def test_saved_directory_holds_the_bundle(computed, tmp_path):
    encoder(tmp_path)
    ours = SentenceTransformer(modules=[module(tmp_path, "embedding")])
    ours.save(str(tmp_path / "saved"))
    ours.save(str(tmp_path / "saved"))  # over itself
    (listed,) = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert listed["path"] == "0_BertileTransformer"
    assert listed["type"] == "bertile.integrations.sentence_transformers.BertileTransformer"
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = SentenceTransformer(
        str(tmp_path / "moved"), trust_remote_code=True, model_kwargs={"threads": 2}
    )
    bundle = again[0].model.bundle
    assert bundle.directory == tmp_path / "moved" / "0_BertileTransformer" and bundle.threads == 2
    close(again.encode(TEXTS), ours.encode(TEXTS))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "moved"))


def test_pooling_of_its_own_follows_an_encoder(computed, tmp_path):
    theirs = encoder(tmp_path, prompts=PROMPTS)
    theirs.set_pooling_include_prompt(False)
    modules = [module(tmp_path, "encoder"), Pooling(WIDTH, "mean", include_prompt=False)]
    ours = SentenceTransformer(modules=[*modules, Normalize()])
    for model in (ours, reloaded(ours, tmp_path / "saved")):
        close(
            model.encode(TEXTS, prompt_name="query"),
            theirs.encode(TEXTS, prompt_name="query"),
        )
        for mine, other in zip(
            model.encode(TEXTS, output_value="token_embeddings"),
            theirs.encode(TEXTS, output_value="token_embeddings"),
        ):
            close(mine, other)


@pytest.mark.parametrize("activation", [None, torch.nn.Identity()])
@pytest.mark.parametrize("labels", [("relevant",), ("a", "b", "c")])
def test_cross_encoder_scores_as_the_original(computed, tmp_path, labels, activation):
    theirs = classifier(tmp_path, labels, activation_fn=activation)
    ours = CrossEncoder(modules=[module(tmp_path, "sequence-classification")])
    for model in (ours, reloaded(ours, tmp_path / "saved")):
        assert model.num_labels == len(labels)
        close(model.predict(originals.PAIRS), theirs.predict(originals.PAIRS))
        close(model.predict(originals.PAIRS[0]), theirs.predict(originals.PAIRS[0]))
        close(
            model.predict(originals.PAIRS, apply_softmax=True, prompt="a "),
            theirs.predict(originals.PAIRS, apply_softmax=True, prompt="a "),
        )
        if len(labels) > 1:
            with pytest.raises(ValueError, match="rank"):
                model.rank("the cat", TEXTS)
            continue
        got, want = (m.rank("the cat", TEXTS, top_k=4) for m in (model, theirs))
        assert [hit["corpus_id"] for hit in got] == [hit["corpus_id"] for hit in want]
        close([hit["score"] for hit in got], [hit["score"] for hit in want])


def test_sparse_encoder_weighs_as_the_original(computed, tmp_path):
    theirs = splade(tmp_path)
    ours = SparseEncoder(modules=[module(tmp_path, "masked-lm"), SpladePooling("max")])
    for model in (ours, reloaded(ours, tmp_path / "saved")):
        got, want = (m.encode(TEXTS, convert_to_sparse_tensor=False) for m in (model, theirs))
        close(got, want)
        assert model.similarity_fn_name == "dot"
        assert model.get_embedding_dimension() == len(originals.WORDS)
        for mine, other in zip(model.decode(got, top_k=3), theirs.decode(want, top_k=3)):
            assert [token for token, _ in mine] == [token for token, _ in other]
            close([weight for _, weight in mine], [weight for _, weight in other])


@pytest.mark.parametrize("setting", ["max_seq_length", "max_length"])
def test_texts_are_cut_where_it_is_asked(computed, tmp_path, setting):
    theirs = encoder(tmp_path)
    ours = SentenceTransformer(modules=[module(tmp_path, "embedding")])
    options = {}
    if setting == "max_seq_length":
        ours.max_seq_length = theirs.max_seq_length = 8
    else:
        options = {"max_length": 8}
    got, want = (model.preprocess(TEXTS, **options) for model in (ours, theirs))
    assert got["input_ids"].shape[1] == 8
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(got[name], want[name])


def test_model_is_pickled_as_the_directory(computed, tmp_path):
    """As a pool of processes does."""
    encoder(tmp_path)
    ours = SentenceTransformer(modules=[module(tmp_path, "embedding")])
    close(pickle.loads(pickle.dumps(ours)).encode(TEXTS), ours.encode(TEXTS))


def test_what_a_bundle_cannot_do_is_refused(computed, tmp_path):
    original = originals.save(tmp_path / "base", "question-answering")
    answers = originals.compute(original, tmp_path / "answers", "question-answering")
    with pytest.raises(UsageError, match="no use for the head question-answering"):
        BertileTransformer(answers)
    encoder(tmp_path / "other")
    bundled = module(tmp_path / "other", "embedding")
    for length in (0, originals.LONGEST + 1):
        with pytest.raises(UsageError, match=f"max_seq_length is {length}; give a number from 1"):
            bundled.max_seq_length = length
    with pytest.raises(UsageError, match="processing_kwargs"):
        bundled.preprocess(["a"], processing_kwargs={"text": {}})
    with pytest.raises(UsageError, match="int is no text"):
        bundled.preprocess([3])


def test_prompts_that_a_pooling_leaves_out_are_refused(computed, tmp_path):
    """A bundle pools all tokens, whatever its pooling says."""
    theirs = encoder(tmp_path, prompts=PROMPTS)
    bundled = module(tmp_path, "embedding")
    manifest = dict(loader.read_manifest(tmp_path / "bundle"))
    assert manifest["text"]["include_prompt"]
    bundled.settings = type(bundled.settings).from_json(
        {**manifest["text"], "include_prompt": False}
    )
    ours = SentenceTransformer(modules=[bundled])
    with pytest.raises(UsageError, match="leaves its prompts out"):
        ours.encode("a", prompt_name="query")
    close(ours.encode("a"), theirs.encode("a"))


@pytest.mark.slow  # a compile of its own
def test_compiled_bundle_encodes_as_torch(tmp_path, stages):
    bundle = tiny_encoder.compile(tmp_path / "bundle", stages)
    ours = SentenceTransformer(modules=[BertileTransformer(bundle)])
    theirs = Transformer(str(tiny_encoder.save(tmp_path / "model"))).model
    texts = ["good movie", "bad", "good good movie " * 20]
    features = ours.preprocess(texts)
    with torch.no_grad():
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        hidden = theirs(**inputs).last_hidden_state
    weights = features["attention_mask"][:, :, None]
    mean = (hidden * weights).sum(1) / weights.sum(1)
    close(ours.encode(texts), torch.nn.functional.normalize(mean))
    close(reloaded(ours, tmp_path / "saved").encode(texts), ours.encode(texts))


@pytest.mark.slow  # three compiles
def test_compiled_bundles_answer_as_the_originals(tmp_path, stages):
    def compiled(directory: Path, head: str) -> BertileTransformer:
        saved = directory / "model"
        original = saved if saved.exists() else directory / "base"
        config = Config(cache_dir=stages, head=head)
        bertile.compile(str(original), directory / "bundle", config)
        return BertileTransformer(directory / "bundle")

    theirs = encoder(tmp_path / "dense", prompts=PROMPTS, default_prompt_name="cat")
    ours = SentenceTransformer(modules=[compiled(tmp_path / "dense", "embedding")])
    close(reloaded(ours, tmp_path / "saved").encode(TEXTS), theirs.encode(TEXTS))

    theirs = classifier(tmp_path / "pairs", ("relevant",))
    ours = CrossEncoder(modules=[compiled(tmp_path / "pairs", "sequence-classification")])
    close(ours.predict(originals.PAIRS), theirs.predict(originals.PAIRS))

    theirs = splade(tmp_path / "sparse")
    modules = [compiled(tmp_path / "sparse", "masked-lm"), SpladePooling("max")]
    got, want = (
        model.encode(TEXTS, convert_to_sparse_tensor=False)
        for model in (SparseEncoder(modules=modules), theirs)
    )
    close(got, want)
