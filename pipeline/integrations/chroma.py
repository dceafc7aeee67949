"""Makes Chroma's embedding function of a bundle, registered under the name "bertile"."""

from __future__ import annotations

from typing import Any

import numpy as np

from bertile.base.errors import UsageError, require
from bertile.integrations import bundles

_types, _functions = require("chroma", "chromadb.api.types", "chromadb.utils.embedding_functions")
# What Chroma calls the ways that vectors are compared in.
SPACES = {"cosine": "cosine", "dot": "ip", "euclidean": "l2"}


@_functions.register_embedding_function
class BertileEmbeddingFunction(_types.EmbeddingFunction):
    """Vectors of a collection's documents and of its queries, each with the model's prompt.

    A collection keeps the directory of its bundle, and opens it again by itself where this module
    was imported. `options` are those of `Embedder.encode`. Raises as `bundles.embedder`.
    """

    def __init__(self, bundle: bundles.Bundle, threads: int | None = None, **options: Any) -> None:
        self._model = bundles.embedder(bundle, threads)
        self._config = {"bundle": bundles.name_of(bundle), "threads": threads, "options": options}

    def __call__(self, input: list[str]) -> list[np.ndarray]:
        return list(self._model.encode_document(input, **self._config["options"]))

    def embed_query(self, input: list[str]) -> list[np.ndarray]:
        """A vector for each question."""
        return list(self._model.encode_query(input, **self._config["options"]))

    @staticmethod
    def name() -> str:
        """What a collection calls it."""
        return "bertile"

    def default_space(self) -> str:
        """How the model's vectors are compared, in Chroma's words."""
        return SPACES.get(self._model.similarity_fn_name, "l2")

    def get_config(self) -> dict[str, Any]:
        """What a collection keeps of it."""
        return dict(self._config)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> BertileEmbeddingFunction:
        """The function that a collection keeps."""
        return BertileEmbeddingFunction(
            config["bundle"], config.get("threads"), **config.get("options", {})
        )

    def validate_config_update(self, old_config: Any, new_config: Any) -> None:
        """UsageError for another bundle: its vectors would stand beside the old one's."""
        if old_config["bundle"] != new_config["bundle"]:
            raise UsageError(
                f"the collection has vectors of {old_config['bundle']}, not of"
                f" {new_config['bundle']}",
                "make a new collection",
            )
