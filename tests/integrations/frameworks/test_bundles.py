"""Adapters take a directory or an open model, refuse what they cannot use, and name their extra."""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_encoder
from helpers.tiny_bundle import change_manifest

import bertile
from bertile.base.errors import MissingExtraError, UsageError
from bertile.integrations import bundles

TEXTS = ["good movie", "bad"]
PACKAGES = {
    "langchain": "langchain_core",
    "llama_index": "llama_index",
    "haystack": "haystack",
    "chroma": "chromadb",
    "spacy": "spacy",
    "fastembed": "fastembed",
    "mteb": "mteb",
}


@pytest.fixture(scope="module")
def tiny(stages, tmp_path_factory) -> Path:
    return tiny_encoder.compile(tmp_path_factory.mktemp("tiny") / "bundle", stages)


def test_embedder_is_opened_once_or_taken_as_it_is(tiny):
    with bundles.embedder(tiny, threads=1) as model:
        assert model.model.threads == 1 and bundles.embedder(model) is model
        assert bundles.name_of(model) == bundles.name_of(tiny) == str(tiny)


def test_other_head_and_other_kind_are_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"has the head 'embedding', this needs 'sequence-cl"):
        bundles.reranker(tiny)
    other = shutil.copytree(tiny, tmp_path / "sparse")
    change_manifest(other, lambda manifest: manifest["text"].update(kind="sparse"))
    with pytest.raises(UsageError, match="makes vectors of the kind 'sparse'; give a bundle"):
        bundles.embedder(other)


def test_model_that_is_pickled_or_copied_is_opened_again(tiny):
    with bertile.open(tiny, threads=1, streams=1) as model:
        want = model.encode(TEXTS)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            with again:
                assert type(again) is type(model) and again.model.threads == 1
                assert np.array_equal(again.encode(TEXTS), want)
        assert np.array_equal(model.encode(TEXTS), want)


def test_encoder_of_ray_adds_vectors_to_a_batch_and_needs_no_ray(tiny):
    encoder = bertile.ray.Encoder(tiny, column="words", output="vector", threads=1)
    batch = {"words": np.array(TEXTS, dtype=object), "place": np.arange(2)}
    with bertile.open(tiny, threads=1) as model:
        want = model.encode(TEXTS)
    result = encoder(batch)
    assert list(result) == ["words", "place", "vector"] and "vector" not in batch
    np.testing.assert_allclose(result["vector"], want, atol=1e-6)
    with pytest.raises(UsageError, match="column 'words' is unknown; did you mean 'word'"):
        encoder({"word": batch["words"]})
    with pytest.raises(UsageError, match="text 2 is a NoneType"):
        encoder({"words": np.array(["good", None], dtype=object)})
    assert encoder({"words": np.array([], dtype=object)})["vector"].shape == (0, want.shape[1])


@pytest.mark.parametrize("module", PACKAGES)
def test_missing_framework_is_named_with_its_extra(module, monkeypatch):
    name = f"bertile.integrations.{module}"
    for loaded in [other for other in sys.modules if other.split(".")[0] == PACKAGES[module]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, PACKAGES[module], None)
    extra = module.replace("_", "-")
    with pytest.raises(
        MissingExtraError, match=rf"install it with: pip install 'bertile\[{extra}\]'"
    ):
        importlib.import_module(name)
