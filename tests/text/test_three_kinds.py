"""Dense, sparse and token vectors of one bundle, as FlagEmbedding makes them of BGE-M3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import sentence_models as tiny

import bertile
from bertile.base.errors import ModelError, UsageError
from bertile.config import Config
from bertile.export import cached

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
TEXTS = [text for text in tiny.TEXTS if text]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of three kinds of vectors, its directory, and both linear layers."""
    place = tmp_path_factory.mktemp("three")
    base = tiny.transformer(place / "base", model_type="roberta")
    parts = [
        modules.Transformer(str(base)),
        modules.Pooling(tiny.WIDTH, "cls"),
        modules.Normalize(),
    ]
    model = library.SentenceTransformer(modules=parts, device="cpu")
    path = tiny.saved(place / "model", model)
    torch.manual_seed(3)
    layers = {
        "sparse_linear": torch.nn.Linear(tiny.WIDTH, 1),
        "colbert_linear": torch.nn.Linear(tiny.WIDTH, 24),
    }
    for name, layer in layers.items():
        torch.save(layer.state_dict(), path / f"{name}.pt")
    return model, path, layers


@pytest.fixture(scope="module")
def bundle(saved, stages, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    bertile.compile(str(saved[1]), directory, Config(cache_dir=stages))
    with bertile.open(directory, threads=1) as model:
        yield model


def hidden(model, text):
    """The ids of a text, and its vectors of tokens behind the transformer."""
    features = model.preprocess([text])
    with torch.no_grad():
        vectors = model[0](dict(features))["token_embeddings"][0]
    return features["input_ids"][0].tolist(), vectors[features["attention_mask"][0] == 1]


def lexical_weights(model, layer, text):
    """As `_process_token_weights` of FlagEmbedding, which leaves out cls, eos, pad and unk."""
    ids, vectors = hidden(model, text)
    weights = torch.relu(layer(vectors)).squeeze(-1).tolist()
    tokenizer, result = model.tokenizer, {}
    unused = {
        getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "eos", "pad", "unk")
    }
    for number, weight in zip(ids, weights):
        if number not in unused and weight > result.get(number, 0):
            result[number] = weight
    return result


@pytest.mark.slow
def test_all_three_are_those_of_the_library(saved, bundle):
    model, _, layers = saved
    dense = model.encode(TEXTS)
    np.testing.assert_allclose(bundle.encode(TEXTS), dense, atol=2e-5)
    sparse = bundle.encode(TEXTS, output_value="token_weights")
    tokens = bundle.encode(TEXTS, output_value="token_embeddings")
    for text, vector, vectors in zip(TEXTS, sparse, tokens):
        with torch.no_grad():
            want = lexical_weights(model, layers["sparse_linear"], text)
            behind = layers["colbert_linear"](hidden(model, text)[1][1:])
        assert dict(zip(vector.indices.tolist(), vector.values)) == pytest.approx(want, abs=2e-5)
        want = torch.nn.functional.normalize(behind, dim=-1).numpy()
        np.testing.assert_allclose(vectors, want, atol=2e-5)
    with pytest.raises(UsageError, match="token_weight' is unknown; did you mean 'token_weights'"):
        bundle.encode(TEXTS, output_value="token_weight")


def test_files_beside_the_checkpoint_are_outputs_and_part_of_the_key(saved, stages, tmp_path):
    weighed = cached.export_cached(str(saved[1]), Config(cache_dir=stages))
    assert weighed.outputs == ("sentence_embedding", "token_weights", "token_embeddings")
    before = weighed.sha256
    layer = torch.nn.Linear(tiny.WIDTH, 2)
    place = saved[1] / "sparse_linear.pt"
    kept = place.read_bytes()
    torch.save(layer.state_dict(), place)
    try:
        with pytest.raises(ModelError, match="gives each token 2 weights, not one"):
            cached.export_cached(str(saved[1]), Config(cache_dir=str(tmp_path)))
    finally:
        place.write_bytes(kept)
    again = cached.export_cached(str(saved[1]), Config(cache_dir=stages))
    assert again.sha256 == before
