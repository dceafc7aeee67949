"""Opens a bundle for texts, as what its head can answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bertile import loader
from bertile.base.errors import BertileError, InputError
from bertile.text.answerer import Answerer
from bertile.text.classifier import Classifier
from bertile.text.embedder import Embedder
from bertile.text.featurizer import Featurizer
from bertile.text.filler import Filler
from bertile.text.tagger import Tagger
from bertile.text.text_model import TextModel

KINDS: dict[str, type[TextModel]] = {
    "embedding": Embedder,
    "encoder": Featurizer,
    "sequence-classification": Classifier,
    "token-classification": Tagger,
    "question-answering": Answerer,
    "masked-lm": Filler,
}


def open(
    directory: str | os.PathLike[str],
    threads: int | None = None,
    *,
    streams: int | None = None,
    verify: bool = True,
    device: int = 0,
    exit_threshold: float | Sequence[float] | None = None,
) -> TextModel:
    """Open the bundle in `directory` for texts: an Embedder, Classifier, Tagger, Answerer, Filler
    or Featurizer, by the head that it was compiled with.

    `threads` is how many cores it may use (default: all that this process may run on). Lists are
    run by `streams` at once, of one thread each (default: one a core); a single text has all cores.
    A bundle for GPUs runs on that of number `device`. `exit_threshold` is as `bertile.load` has it.
    `verify` compares the hash of every file with the manifest. Raises what `bertile.load` raises,
    InputError for a head that gives no answer to a text, BundleError for a tokenizer that is
    missing or cannot be read.
    """
    chosen = {"verify": verify, "device": device, "exit_threshold": exit_threshold}
    model = loader.load(directory, threads, **chosen)
    head = model.manifest["model"]["head"]
    if head not in KINDS:
        model.close()
        raise InputError(
            f"{directory} has the head '{head}', which gives no answer to a text",
            f"compile the model with a --head of {', '.join(KINDS)}, or use bertile.load",
        )
    try:
        return KINDS[head](model, Path(directory), streams)
    except BertileError:
        model.close()
        raise
