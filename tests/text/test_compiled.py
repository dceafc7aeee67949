"""Compiled bundles answer as the original libraries: export, compile, open, ask.

The quick tests beside ask the directories' own models in torch, for the same answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.text_models import LONG, TEXTS, assert_same, mixed

import bertile
from bertile.config import Config

pytestmark = pytest.mark.slow  # compiles a model for each head

# fp32 in another order of sums, through weights that are larger than a trained model's
CLOSE = dict(rtol=0, atol=1e-3)
ALL = [*TEXTS, LONG, *mixed(20)]


@pytest.fixture(scope="module")
def opened(saved, stages: str, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    def of(name: str, directory: Path | None = None):
        output = tmp_path_factory.mktemp(f"compiled-{name}")
        bertile.compile(str(directory or saved(name)), output, Config(cache_dir=stages))
        return bertile.open(output, threads=2)

    return of


def pipeline(task: str, directory: Path):
    import transformers

    return transformers.pipeline(task, str(directory), device="cpu")


def test_embedder_is_as_sentence_transformers(opened, sentences: Path) -> None:
    from sentence_transformers import SentenceTransformer

    original = SentenceTransformer(str(sentences), device="cpu")
    texts = [*ALL, *mixed(1200, 1)]
    with opened("embedder", sentences) as model:
        assert model.prompts == original.prompts
        assert model.max_seq_length == original.max_seq_length
        for options in ({}, {"prompt_name": "passage"}, {"normalize_embeddings": True}):
            want = original.encode(texts, **options)
            np.testing.assert_allclose(model.encode(texts, **options), want, **CLOSE)
            np.testing.assert_allclose(model.encode(texts[0], **options), want[0], **CLOSE)
        assert model.truncated == 0


@pytest.mark.parametrize("kind", ["score", "labels"])
def test_classifier_is_as_cross_encoder_and_the_pipeline(opened, saved, kind) -> None:
    from sentence_transformers import CrossEncoder

    pairs = [("Who lives in New York?", text) for text in ALL]
    with opened(kind) as model:
        want = CrossEncoder(str(saved(kind)), device="cpu").predict(pairs)
        np.testing.assert_allclose(model.predict(pairs), want, **CLOSE)
        original = pipeline("text-classification", saved(kind))
        assert_same(model.classify(ALL[:8], None), original(ALL[:8], top_k=None), 1e-3)
        if kind == "labels":
            original = pipeline("zero-shot-classification", saved(kind))
            labels = ["film", "cat", "city"]
            texts = [text for text in ALL[:4] if text]  # the original refuses an empty one
            assert_same(model.zero_shot(texts, labels), original(texts, labels), 1e-3)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("kind", ["tagger", "roberta-tagger"])
@pytest.mark.parametrize("strategy", ["none", "average"])
def test_tagger_is_as_the_pipeline(opened, saved, kind, strategy) -> None:
    want = pipeline("token-classification", saved(kind))(ALL, aggregation_strategy=strategy)
    with opened(kind) as model:
        assert_same(model.entities(ALL, strategy), want, 1e-3)


@pytest.mark.filterwarnings("error:input_ids have padding")
@pytest.mark.parametrize("kind", ["filler", "roberta-filler"])
def test_filler_is_as_the_pipeline(opened, saved, kind) -> None:
    with opened(kind) as model:
        texts = [f"The {model.mask_token} sat on the mat.", f"{model.mask_token}{model.mask_token}"]
        assert_same(model.fill(texts), pipeline("fill-mask", saved(kind))(texts), 1e-3)


def test_features_are_as_the_pipelines(opened, saved) -> None:
    want = pipeline("feature-extraction", saved("encoder"))(ALL, truncation=True)
    with opened("encoder") as model:
        for rows, theirs in zip(model.features(ALL), want, strict=True):
            np.testing.assert_allclose(rows, theirs[0], **CLOSE)


def test_answerer_is_as_its_model_in_torch(opened, saved) -> None:
    """Whose answers tests/text/test_answerer.py compares with every span."""
    from helpers import text_models

    original = text_models.stand_in(saved("answerer"), "question-answering")
    with opened("answerer") as model:
        for context in ("Zoë lives in New York, not in Berlin!", " ".join(ALL)):
            got = model.answer("Who lives in New York?", context, 3)
            assert_same(got, original.answer("Who lives in New York?", context, 3), 1e-3)
