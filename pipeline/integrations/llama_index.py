"""Makes LlamaIndex's embedding model and its reranking postprocessor of a bundle."""

from __future__ import annotations

import asyncio
from typing import Any

from bertile.base.errors import UsageError, require
from bertile.integrations import bundles
from bertile.text.engine import WINDOW

_embeddings, _types, _schema, _pydantic = require(
    "llama-index",
    "llama_index.core.embeddings",
    "llama_index.core.postprocessor.types",
    "llama_index.core.schema",
    "llama_index.core.bridge.pydantic",
)


class BertileEmbedding(_embeddings.BaseEmbedding):
    """Vectors of texts and of queries, each with the prompt that the model has for it.

    `options` are those of `Embedder.encode`; other fields are BaseEmbedding's. Raises as
    `bundles.embedder`.
    """

    threads: int | None = None
    options: dict[str, Any] = _pydantic.Field(default_factory=dict)
    _model: Any = _pydantic.PrivateAttr()

    def __init__(self, bundle: bundles.Bundle = "", **fields: Any) -> None:
        # what is read back from a file has the bundle as its name
        bundle = bundle or fields.pop("model_name")
        fields = {"embed_batch_size": WINDOW, **fields, "model_name": bundles.name_of(bundle)}
        super().__init__(**fields)
        self._model = bundles.embedder(bundle, self.threads)

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex writes down."""
        return "BertileEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.encode_query(query, **self.options).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.encode_document(text, **self.options).tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode_document(list(texts), **self.options).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class BertileRerank(_types.BaseNodePostprocessor):
    """The `top_n` nodes that answer a query best, scored anew."""

    bundle: str
    top_n: int = 2
    threads: int | None = None
    _model: Any = _pydantic.PrivateAttr()

    def __init__(self, bundle: bundles.Bundle, **fields: Any) -> None:
        super().__init__(bundle=bundles.name_of(bundle), **fields)
        self._model = bundles.reranker(bundle, self.threads)

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex writes down."""
        return "BertileRerank"

    def _postprocess_nodes(self, nodes: list[Any], query_bundle: Any = None) -> list[Any]:
        if query_bundle is None:
            raise UsageError("a reranker needs the query", "give query_bundle or query_str")
        mode = _schema.MetadataMode.EMBED
        texts = [node.node.get_content(metadata_mode=mode) for node in nodes]
        ranks = self._model.rank(query_bundle.query_str, texts, top_k=self.top_n)
        return [
            _schema.NodeWithScore(node=nodes[rank["corpus_id"]].node, score=float(rank["score"]))
            for rank in ranks
        ]
