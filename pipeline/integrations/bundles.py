"""Opens what an adapter is handed, a bundle or a model that is open, and refuses another head."""

from __future__ import annotations

import os
from typing import TypeVar, Union

import bertile.text
from bertile.base.errors import UsageError
from bertile.text import Classifier, Embedder, TextModel

Bundle = Union[str, "os.PathLike[str]", TextModel]
T = TypeVar("T", bound=TextModel)


def embedder(bundle: Bundle, threads: int | None = None) -> Embedder:
    """The model of vectors (d,) in a bundle's directory, on `threads` cores (default: all).

    An open model is taken as it is. Raises what `bertile.open` raises, and UsageError for a bundle
    of another head, or whose vectors are sparse or one for each token.
    """
    model = _opened(bundle, threads, Embedder, "embedding")
    if model.settings.kind != "dense":
        raise UsageError(
            f"{model.model.directory} makes vectors of the kind '{model.settings.kind}'",
            "give a bundle that makes one dense vector of a text",
        )
    return model


def reranker(bundle: Bundle, threads: int | None = None) -> Classifier:
    """The model that scores pairs of texts; as `embedder`."""
    return _opened(bundle, threads, Classifier, "sequence-classification")


def name_of(bundle: Bundle) -> str:
    """The directory of a bundle, which is how an adapter is written down."""
    return str(bundle.model.directory) if isinstance(bundle, TextModel) else os.fspath(bundle)


def _opened(bundle: Bundle, threads: int | None, kind: type[T], head: str) -> T:
    model = bundle if isinstance(bundle, TextModel) else bertile.text.open(bundle, threads)
    if not isinstance(model, kind):
        raise UsageError(
            f"{name_of(bundle)} has the head '{model.model.manifest['model']['head']}', this needs"
            f" '{head}'",
            f"compile the model with --head {head}",
        )
    return model
