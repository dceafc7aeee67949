"""What tests of the adapters share: bundles, and what sentence-transformers says of their texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny_bundle import change_manifest

import bertile

PROMPTS = {"query": "query: ", "document": "passage: "}
TEXTS = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "Stocks fell sharply on Monday.",
    "Grüße aus Köln, 東京!",
    "The cat sat on the mat. " * 40,
    "?",
]
QUERY = "Who makes music?"


@pytest.fixture(scope="session")
def texts() -> SimpleNamespace:
    """The texts and the query, and of both the vectors that sentence-transformers gives them."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the reference")
    from bertile.export import checkpoints

    directory = str(checkpoints.find_directory("minilm"))
    model = sentence_transformers.SentenceTransformer(directory, device="cpu", prompts=PROMPTS)
    return SimpleNamespace(
        all=TEXTS,
        query=QUERY,
        plain=model.encode(TEXTS),
        of_documents=model.encode_document(TEXTS),
        of_query=model.encode_query(QUERY),
        model=model,
    )


@pytest.fixture(scope="session")
def minilm(stages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a prompt for queries and another for documents, so that a swap is seen."""
    place = tmp_path_factory.mktemp("minilm") / "bundle"
    bertile.compile("minilm", place, cache_dir=Path(stages))
    change_manifest(place, lambda manifest: manifest["text"].update(prompts=PROMPTS))
    return place


@pytest.fixture(scope="session")
def reranker(stages: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bundle that scores pairs, with random weights, and CrossEncoder's scores of the texts."""
    transformers = pytest.importorskip("transformers", reason="the model is one of its classes")
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the reference")
    from bertile.export import checkpoints

    directory = tmp_path_factory.mktemp("reranker") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints.find_directory("minilm"))
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=1,
        initializer_range=0.5,  # which sets the scores apart
    )
    transformers.BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    place = directory.parent / "bundle"
    bertile.compile(directory, place, cache_dir=Path(stages))
    model = sentence_transformers.CrossEncoder(str(directory), device="cpu")
    scores = model.predict([(QUERY, text) for text in TEXTS])
    return SimpleNamespace(bundle=place, scores=scores, order=np.argsort(-scores).tolist())
