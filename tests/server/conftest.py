"""A server of tiny models, which answer as their directories' own libraries do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import text_models

LABELS = ("contradiction", "neutral", "entailment")
PROMPTS = {"query": "What: ", "passage": "film "}


@pytest.fixture(scope="package")
def single_thread() -> Iterator[None]:
    """Models as small as these take longer on several threads of torch."""
    pytest.importorskip("torch", reason="the original models are those of torch")
    with text_models.single_thread():
        yield


@pytest.fixture(scope="package")
def directories(single_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each kind of model."""
    pytest.importorskip("sentence_transformers", reason="which is what is compared with")
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    root = tmp_path_factory.mktemp("served")
    classes = {"kind": "SequenceClassification"}
    return {
        "dense": text_models.save_sentences(root / "dense", prompts=PROMPTS),
        "score": text_models.save(root / "score", **classes, labels=("relevant",)),
        "labels": text_models.save(root / "labels", **classes, labels=LABELS),
        "encoder": text_models.save(root / "encoder", ""),
        "splade": text_models.save(root / "splade", "MaskedLM"),
    }


@pytest.fixture(scope="package")
def original(directories: dict[str, Path]) -> Any:
    """The sentence encoder in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directories["dense"]), device="cpu")


@pytest.fixture
def open_stand_in(
    directories: dict[str, Path], original: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """What takes the place of `bertile.open`; the models that it gave are in its `opened`."""
    from bertile import text

    heads = {"score": "sequence-classification", "labels": "sequence-classification"}

    def open_(directory: Any, *_: Any, **__: Any) -> Any:
        name = next(name for name, path in directories.items() if path == Path(directory))
        if name == "dense":
            model = text_models.stand_in_of_sentences(directories[name], original)
        elif name == "splade":
            model = text_models.stand_in_of_splade(directories[name])
        else:
            model = text_models.stand_in(directories[name], heads.get(name, name))
        open_.opened.append(model)
        return model

    open_.opened = []
    monkeypatch.setattr(text, "open", open_)
    return open_


@pytest.fixture
def serve(
    directories: dict[str, Path], open_stand_in: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """A client of a server of these kinds, with settings by their names."""
    from contextlib import ExitStack

    from starlette.testclient import TestClient

    from bertile.server.application import application
    from bertile.server.settings import Settings

    with ExitStack() as stack:

        def start(*names: str, **settings: Any) -> Any:
            chosen = Settings(**{"max_batch_tokens": 512, "quiet": True, **settings})
            app = application({name: directories[name] for name in names}, chosen)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start
