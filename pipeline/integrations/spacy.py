"""Gives spaCy's documents, spans and tokens the vectors of a bundle: nlp.add_pipe("bertile")."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from bertile.base.errors import require
from bertile.integrations import bundles
from bertile.text.engine import WINDOW

_language, _tokens = require("spacy", "spacy.language", "spacy.tokens")


@_language.Language.factory("bertile", default_config={"threads": None, "options": {}})
class BertileVectors:
    """Sets `doc.vector`; spans and tokens get the vector of their own text when it is asked for.

    `options` are those of `Embedder.encode`. Raises as `bundles.embedder`.
    """

    def __init__(
        self, nlp: Any, name: str, bundle: str, threads: int | None, options: dict[str, Any]
    ) -> None:
        self.name, self.options = name, options
        self._model = bundles.embedder(bundle, threads)

    def __call__(self, doc: Any) -> Any:
        return self._with(doc, self._vector(doc))

    def pipe(self, docs: Iterable[Any], batch_size: int = WINDOW) -> Iterator[Any]:
        """The documents with their vectors, in their order; a batch runs together."""
        stream = iter(docs)
        while batch := list(islice(stream, batch_size)):
            vectors = self._model.encode([doc.text for doc in batch], **self.options)
            yield from map(self._with, batch, vectors)

    def _vector(self, part: Any) -> np.ndarray:
        """Of a document, a span or a token."""
        return self._model.encode(part.text, **self.options)

    def _with(self, doc: Any, vector: np.ndarray) -> Any:
        doc.vector, doc.vector_norm = vector, float(np.linalg.norm(vector))
        for hooks in (doc.user_hooks, doc.user_span_hooks, doc.user_token_hooks):
            hooks.update(has_vector=_yes, similarity=self._similarity)
        for hooks in (doc.user_span_hooks, doc.user_token_hooks):
            hooks["vector"] = self._vector
        return doc

    def _similarity(self, part: Any, other: Any) -> float:
        return float(self._model.similarity(part.vector, other.vector)[0, 0])


def _yes(_part: Any) -> bool:
    return True
