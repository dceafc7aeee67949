"""LlamaIndex gets the vectors and the order that sentence-transformers gives."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from bertile.base.errors import UsageError

pytestmark = pytest.mark.slow  # compiles MiniLM; the package is in the extra "slow"
pytest.importorskip("llama_index.core", reason="the extra 'llama-index' is not installed")


def test_vectors_are_those_of_sentence_transformers(minilm, texts):
    from bertile.integrations.llama_index import BertileEmbedding

    model = BertileEmbedding(minilm)
    assert model.model_name == str(minilm)
    vectors = model.get_text_embedding_batch(texts.all)
    np.testing.assert_allclose(vectors, texts.of_documents, atol=1e-4)
    first = model.get_text_embedding(texts.all[0])
    np.testing.assert_allclose(first, texts.of_documents[0], atol=1e-4)
    np.testing.assert_allclose(model.get_query_embedding(texts.query), texts.of_query, atol=1e-4)

    async def later():
        batch = await model.aget_text_embedding_batch(texts.all)
        return batch, await model.aget_query_embedding(texts.query)

    batch, query = asyncio.run(later())
    np.testing.assert_allclose(batch, texts.of_documents, atol=1e-4)
    np.testing.assert_allclose(query, texts.of_query, atol=1e-4)


def test_options_are_those_of_encode_and_are_written_down(minilm, texts):
    from bertile.integrations.llama_index import BertileEmbedding

    model = BertileEmbedding(minilm, options={"truncate_dim": 16})
    again = BertileEmbedding.from_json(model.to_json())
    assert again.embed_batch_size == model.embed_batch_size == 512
    want = texts.of_query[:16]
    np.testing.assert_allclose(again.get_query_embedding(texts.query), want, atol=1e-4)


def test_index_gets_what_is_nearest(minilm, texts):
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    from bertile.integrations.llama_index import BertileEmbedding

    nodes = [TextNode(text=text) for text in texts.all]
    index = VectorStoreIndex(nodes, embed_model=BertileEmbedding(minilm))
    nearest = index.as_retriever(similarity_top_k=3).retrieve(texts.query)
    order = np.argsort(-(texts.of_documents @ texts.of_query))[:3]
    assert [node.text for node in nearest] == [texts.all[i] for i in order]


def test_reranker_keeps_the_best_as_cross_encoder_scores_them(reranker, texts):
    from llama_index.core.schema import NodeWithScore, TextNode

    from bertile.integrations.llama_index import BertileRerank

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts.all]
    best = BertileRerank(reranker.bundle, top_n=4).postprocess_nodes(nodes, query_str=texts.query)
    assert [node.text for node in best] == [texts.all[i] for i in reranker.order[:4]]
    scores = [node.score for node in best]
    np.testing.assert_allclose(scores, reranker.scores[reranker.order[:4]], atol=1e-4)
    assert nodes[0].score == 0.5
    with pytest.raises(UsageError, match="a reranker needs the query"):
        BertileRerank(reranker.bundle).postprocess_nodes(nodes)
