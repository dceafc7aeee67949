"""Makes a model of FastEmbed's of a bundle: TextEmbedding takes it by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from bertile.base.errors import UsageError, require
from bertile.integrations import bundles

_text, _base, _description = require(
    "fastembed",
    "fastembed.text.text_embedding",
    "fastembed.text.text_embedding_base",
    "fastembed.common.model_description",
)


def add_bundle(bundle: bundles.Bundle, model_name: str | None = None) -> str:
    """Let `TextEmbedding(model_name)` be a bundle, by default under its directory's name.

    Returns the name. Raises as `bundles.embedder`, and UsageError for a name that is taken.
    """
    directory = bundles.name_of(bundle)
    name = model_name or directory
    taken = {known.model.lower() for known in _text.TextEmbedding._list_supported_models()}
    if name.lower() in taken:
        raise UsageError(f"FastEmbed has a model '{name}' already", "give another model_name")
    with bundles.embedder(directory) as model:
        size = model.get_sentence_embedding_dimension()
    BertileTextEmbedding.added[name.lower()] = _description.DenseModelDescription(
        model=name,
        sources=_description.ModelSource(url=directory),
        model_file="",
        description="a bundle of Bertile",
        license="",
        size_in_GB=0.0,
        dim=size,
    )
    if BertileTextEmbedding not in _text.TextEmbedding.EMBEDDINGS_REGISTRY:
        _text.TextEmbedding.EMBEDDINGS_REGISTRY.append(BertileTextEmbedding)
    return name


class BertileTextEmbedding(_base.TextEmbeddingBase):
    """A bundle by the name that `add_bundle` gave it.

    Arguments about devices and downloads are taken and not used: a bundle is for the machine that
    it was compiled for. Nor are `batch_size` and `parallel`: texts run together by their tokens, on
    `threads` cores.
    """

    added: ClassVar[dict[str, Any]] = {}  # descriptions, by their names in lower case

    def __init__(self, model_name: str, threads: int | None = None, **options: Any) -> None:
        super().__init__(model_name, options.get("cache_dir"), threads)
        self.model = bundles.embedder(self.added[model_name.lower()].sources.url, threads)

    def embed(
        self,
        documents: str | Iterable[str],
        batch_size: int = 256,
        parallel: int | None = None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """A vector (d,) float32 for each text as it comes; `options` as of `Embedder.encode`."""
        texts = [documents] if isinstance(documents, str) else documents
        yield from self.model.encode_iter(texts, **options)

    def query_embed(self, query: str | Iterable[str], **options: Any) -> Iterator[np.ndarray]:
        """As `embed`, with the model's prompt for queries."""
        yield from self.embed(query, **{"prompt_name": "query", **options})

    def passage_embed(self, texts: str | Iterable[str], **options: Any) -> Iterator[np.ndarray]:
        """As `embed`, with the model's prompt for documents."""
        yield from self.embed(texts, **{"prompt_name": "document", **options})

    def token_count(self, texts: str | Iterable[str], **_options: Any) -> int:
        """How many tokens of the texts the model sees."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        lengths = [len(encoding) for encoding in self.model.tokenizer.encode_batch(texts)]
        return sum(min(length, self.model.max_seq_length or length) for length in lengths)

    @property
    def embedding_size(self) -> int:
        """How many numbers a vector has."""
        return self.get_embedding_size(self.model_name)

    @classmethod
    def get_embedding_size(cls, model_name: str) -> int:
        """How many numbers a vector of that model has."""
        return cls.added[model_name.lower()].dim

    @classmethod
    def _list_supported_models(cls) -> list[Any]:
        return list(cls.added.values())
