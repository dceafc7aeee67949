"""Makes Haystack's embedders, for a query and for documents, and its ranker of a bundle."""

from __future__ import annotations

import dataclasses
from typing import Any

from bertile.base.errors import require
from bertile.integrations import bundles

(_haystack,) = require("haystack", "haystack")
component, Document = _haystack.component, _haystack.Document


class _Bertile:
    """What a pipeline's file says of a component: its arguments. The bundle opens when it runs."""

    open = staticmethod(bundles.embedder)

    def _keep(self, bundle: bundles.Bundle, threads: int | None, **arguments: Any) -> None:
        # not __init__: `component` makes each class anew, which super() does not survive
        self._bundle, self._threads, self._arguments = bundle, threads, arguments
        self._model: Any = None

    def warm_up(self) -> None:
        """Open the bundle, unless it is open; raises as `bundles.embedder`."""
        if self._model is None:
            self._model = type(self).open(self._bundle, self._threads)

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline is saved, its bundle by its directory."""
        fields = {"bundle": bundles.name_of(self._bundle), "threads": self._threads}
        return _haystack.default_to_dict(self, **fields, **self._arguments)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """What `to_dict` has written down."""
        return _haystack.default_from_dict(cls, data)


@component
class BertileTextEmbedder(_Bertile):
    """The vector of a query, with the model's prompt for queries.

    `options` are those of `Embedder.encode`, as in all components here.
    """

    def __init__(
        self,
        bundle: bundles.Bundle,
        threads: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._keep(bundle, threads, options=options)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """{"embedding"}, the vector of the text."""
        self.warm_up()
        options = self._arguments["options"] or {}
        return {"embedding": self._model.encode_query(text, **options).tolist()}


@component
class BertileDocumentEmbedder(_Bertile):
    """The documents with their vectors, with the model's prompt for documents.

    The fields of a document's meta in `meta_fields_to_embed` are put in front of its text.
    """

    def __init__(
        self,
        bundle: bundles.Bundle,
        threads: int | None = None,
        options: dict[str, Any] | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        self._keep(
            bundle,
            threads,
            options=options,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
        )

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """{"documents"}, copies that have an `embedding`, in their order."""
        self.warm_up()
        texts = [self._text(document) for document in documents]
        vectors = self._model.encode_document(texts, **(self._arguments["options"] or {}))
        pairs = zip(documents, vectors.tolist())
        return {"documents": [dataclasses.replace(d, embedding=vector) for d, vector in pairs]}

    def _text(self, document: Any) -> str:
        names = self._arguments["meta_fields_to_embed"] or ()
        meta = [str(document.meta[name]) for name in names if document.meta.get(name) is not None]
        return self._arguments["embedding_separator"].join([*meta, document.content or ""])


@component
class BertileRanker(_Bertile):
    """The `top_k` documents that answer a query best, with their scores."""

    open = staticmethod(bundles.reranker)

    def __init__(
        self, bundle: bundles.Bundle, threads: int | None = None, top_k: int | None = 10
    ) -> None:
        self._keep(bundle, threads, top_k=top_k)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document]) -> dict[str, Any]:
        """{"documents"}, copies with their `score`, the best first."""
        self.warm_up()
        texts = [document.content or "" for document in documents]
        ranks = self._model.rank(query, texts, top_k=self._arguments["top_k"])
        return {
            "documents": [
                dataclasses.replace(documents[rank["corpus_id"]], score=float(rank["score"]))
                for rank in ranks
            ]
        }
