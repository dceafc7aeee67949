"""Haystack's pipelines get the vectors and the order that sentence-transformers gives."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("haystack", reason="the extra 'haystack' is not installed")


def test_documents_get_the_vectors_of_sentence_transformers(minilm, texts):
    from haystack import Document

    from bertile.integrations.haystack import BertileDocumentEmbedder

    documents = [Document(content=text) for text in texts.all]
    embedded = BertileDocumentEmbedder(minilm).run(documents=documents)["documents"]
    assert [document.content for document in embedded] == texts.all
    vectors = [document.embedding for document in embedded]
    np.testing.assert_allclose(vectors, texts.of_documents, atol=1e-4)
    assert documents[0].embedding is None
    assert BertileDocumentEmbedder(minilm).run(documents=[])["documents"] == []


def test_fields_of_meta_stand_before_the_text(minilm, texts):
    from haystack import Document

    from bertile.integrations.haystack import BertileDocumentEmbedder

    embedder = BertileDocumentEmbedder(minilm, meta_fields_to_embed=["title", "year", "none"])
    documents = [Document(content="It sat.", meta={"title": "The cat", "year": 1999})]
    (document,) = embedder.run(documents=documents)["documents"]
    want = texts.model.encode_document("The cat\n1999\nIt sat.")
    np.testing.assert_allclose(document.embedding, want, atol=1e-4)


def test_pipeline_is_saved_read_and_answers(minilm, texts):
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from bertile.integrations.haystack import BertileDocumentEmbedder, BertileTextEmbedder

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = [Document(content=text) for text in texts.all]
    store.write_documents(BertileDocumentEmbedder(minilm).run(documents=documents)["documents"])
    first = Pipeline()
    first.add_component(
        "embed", BertileTextEmbedder(minilm, options={"normalize_embeddings": True})
    )
    embed = Pipeline.loads(first.dumps(), allowed_modules=["bertile.integrations.haystack"])
    embed.add_component("retrieve", InMemoryEmbeddingRetriever(store, top_k=3))
    embed.connect("embed.embedding", "retrieve.query_embedding")
    nearest = embed.run({"embed": {"text": texts.query}})["retrieve"]["documents"]
    order = np.argsort(-(texts.of_documents @ texts.of_query))[:3]
    assert [document.content for document in nearest] == [texts.all[i] for i in order]


def test_components_are_written_down_with_all_that_they_were_asked_for(minilm, reranker):
    from bertile.integrations import haystack

    for component in (
        haystack.BertileTextEmbedder(minilm, threads=1),
        haystack.BertileDocumentEmbedder(minilm, meta_fields_to_embed=["a"]),
        haystack.BertileRanker(reranker.bundle, top_k=2),
    ):
        written = component.to_dict()
        assert type(component).from_dict(written).to_dict() == written
        assert written["init_parameters"]["bundle"] in (str(minilm), str(reranker.bundle))


def test_ranker_keeps_the_best_as_cross_encoder_scores_them(reranker, texts):
    from haystack import Document

    from bertile.integrations.haystack import BertileRanker

    documents = [Document(content=text) for text in texts.all]
    best = BertileRanker(reranker.bundle, top_k=4).run(query=texts.query, documents=documents)
    order = reranker.order[:4]
    assert [document.content for document in best["documents"]] == [texts.all[i] for i in order]
    scores = [document.score for document in best["documents"]]
    np.testing.assert_allclose(scores, reranker.scores[order], atol=1e-4)
