"""Makes LangChain's embeddings and its reranker of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bertile.base.errors import require
from bertile.integrations import bundles

_embeddings, _documents = require(
    "langchain", "langchain_core.embeddings", "langchain_core.documents"
)


class BertileEmbeddings(_embeddings.Embeddings):
    """Vectors of documents and of queries, each with the prompt that the model has for it.

    `options` are those of `Embedder.encode`, as `normalize_embeddings`. The async methods run in
    LangChain's executor. Raises as `bundles.embedder`.
    """

    def __init__(self, bundle: bundles.Bundle, threads: int | None = None, **options: Any) -> None:
        self.model, self.options = bundles.embedder(bundle, threads), options

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in their order."""
        return self.model.encode_document(list(texts), **self.options).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return self.model.encode_query(text, **self.options).tolist()


class BertileReranker(_documents.BaseDocumentCompressor):
    """The `top_n` documents that answer a query best, each with its "relevance_score"."""

    bundle: str
    top_n: int = 3
    threads: int | None = None
    _model: Any = None

    def __init__(self, bundle: bundles.Bundle, **fields: Any) -> None:
        super().__init__(bundle=bundles.name_of(bundle), **fields)
        self._model = bundles.reranker(bundle, self.threads)

    def compress_documents(
        self, documents: Sequence[Any], query: str, callbacks: Any = None
    ) -> list[Any]:
        """Copies of the best documents, the best first."""
        texts = [document.page_content for document in documents]
        ranks = self._model.rank(query, texts, top_k=self.top_n)
        chosen = []
        for rank in ranks:
            document = documents[rank["corpus_id"]]
            metadata = {**document.metadata, "relevance_score": float(rank["score"])}
            chosen.append(document.model_copy(update={"metadata": metadata}))
        return chosen
