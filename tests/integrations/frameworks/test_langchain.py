"""LangChain gets the vectors and the order that sentence-transformers gives."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import bertile
from bertile.base.errors import UsageError

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("langchain_core", reason="the extra 'langchain' is not installed")


def test_vectors_are_those_of_sentence_transformers(minilm, texts):
    from bertile.integrations.langchain import BertileEmbeddings

    embeddings = BertileEmbeddings(minilm)
    vectors = embeddings.embed_documents(texts.all)
    assert type(vectors) is list and type(vectors[0][0]) is float
    np.testing.assert_allclose(vectors, texts.of_documents, atol=1e-4)
    np.testing.assert_allclose(embeddings.embed_query(texts.query), texts.of_query, atol=1e-4)
    later = asyncio.run(embeddings.aembed_documents(texts.all))
    np.testing.assert_allclose(later, vectors, atol=1e-6)
    assert embeddings.embed_documents([]) == []


def test_vector_store_gets_what_is_nearest(minilm, texts):
    from langchain_core.vectorstores import InMemoryVectorStore

    from bertile.integrations.langchain import BertileEmbeddings

    with bertile.open(minilm) as model:
        store = InMemoryVectorStore.from_texts(texts.all, BertileEmbeddings(model))
        nearest = store.similarity_search(texts.query, k=3)
    order = np.argsort(-(texts.of_documents @ texts.of_query))[:3]
    assert [document.page_content for document in nearest] == [texts.all[i] for i in order]


def test_reranker_keeps_the_best_as_cross_encoder_scores_them(reranker, texts):
    from langchain_core.documents import Document

    from bertile.integrations.langchain import BertileReranker

    documents = [Document(text, metadata={"place": i}) for i, text in enumerate(texts.all)]
    compressor = BertileReranker(reranker.bundle, top_n=4)
    best = compressor.compress_documents(documents, texts.query)
    assert [document.metadata["place"] for document in best] == reranker.order[:4]
    scores = [document.metadata["relevance_score"] for document in best]
    np.testing.assert_allclose(scores, reranker.scores[reranker.order[:4]], atol=1e-4)
    assert "relevance_score" not in documents[0].metadata
    assert compressor.compress_documents([], texts.query) == []


def test_another_head_is_refused(minilm, reranker):
    from bertile.integrations.langchain import BertileEmbeddings, BertileReranker

    with pytest.raises(UsageError, match="this needs 'embedding'"):
        BertileEmbeddings(reranker.bundle)
    with pytest.raises(UsageError, match="compile the model with --head sequence-classification"):
        BertileReranker(minilm)
