"""Chroma's collections get the vectors of sentence-transformers, and open their bundle again."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.base.errors import UsageError

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("chromadb", reason="the extra 'chroma' is not installed")


@pytest.fixture
def client(tmp_path):
    import chromadb

    return chromadb.PersistentClient(
        str(tmp_path), settings=chromadb.Settings(anonymized_telemetry=False)
    )


def test_collection_gets_what_is_nearest_and_opens_its_bundle_again(client, minilm, texts):
    from bertile.integrations.chroma import BertileEmbeddingFunction

    function = BertileEmbeddingFunction(minilm)
    ids = [str(number) for number in range(len(texts.all))]
    client.create_collection("texts", embedding_function=function).add(ids=ids, documents=texts.all)
    collection = client.get_collection("texts")  # which has the function's name and its bundle
    kept = collection.get(ids=ids, include=["embeddings"])["embeddings"]
    np.testing.assert_allclose(kept, texts.of_documents, atol=1e-4)
    answer = collection.query(query_texts=[texts.query], n_results=3)
    distances = 1 - texts.of_documents @ texts.of_query
    order = np.argsort(distances)[:3]
    assert answer["ids"] == [[ids[i] for i in order]]
    assert collection.configuration["hnsw"]["space"] == "cosine"
    np.testing.assert_allclose(answer["distances"][0], distances[order], atol=1e-4)


def test_options_are_kept_and_another_bundle_is_refused(minilm, texts):
    from bertile.integrations.chroma import BertileEmbeddingFunction

    function = BertileEmbeddingFunction(minilm, truncate_dim=16)
    again = BertileEmbeddingFunction.build_from_config(function.get_config())
    assert again.get_config() == function.get_config() and not again.is_legacy()
    (vector,) = again.embed_query([texts.query])
    np.testing.assert_allclose(vector, texts.of_query[:16], atol=1e-4)
    with pytest.raises(UsageError, match="make a new collection"):
        function.validate_config_update(function.get_config(), {"bundle": "elsewhere"})
