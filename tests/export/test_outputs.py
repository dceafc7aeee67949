"""What is ours beside a head's usual outputs: hidden states, attentions, those of pre-training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import family_models

import bertile
from bertile.base.errors import UsageError
from bertile.config import Config
from bertile.export import cached, checkpoints
from bertile.onnx.samples import run_onnx, sample

NAMES = ("last_hidden_state", "pooler_output")
LAYERS = ("hidden_states.0", "hidden_states.1", "hidden_states.2", "attentions.0", "attentions.1")


def test_hidden_states_and_attentions_are_transformers(stages, tmp_path):
    source = str(family_models.directory("bert-tiny", "encoder", stages))
    asked = {"output_hidden_states": True, "output_attentions": True}
    config = Config(cache_dir=stages, tune="none", runtime="none", threads=1, **asked)
    bertile.compile(source, tmp_path / "bundle", config)
    model = checkpoints.load(source).model
    with bertile.load(tmp_path / "bundle", threads=1) as bundle:
        assert [output["name"] for output in bundle.manifest["outputs"]] == [*NAMES, *LAYERS]
        for seed, shape in enumerate(((1, 1), (3, 37), (2, 16))):
            arrays = sample(cached.export_cached(source, config).inputs, *shape, 0, seed)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            with torch.no_grad():
                want = model(**tensors, **asked)
            got, real = bundle(**arrays), arrays["attention_mask"] == 1
            for layer in range(3):
                expected = want.hidden_states[layer].numpy()
                ours = got[f"hidden_states.{layer}"]
                np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=1e-4)
            for layer in range(2):  # (batch, heads, queries, keys): of real queries
                expected = want.attentions[layer].numpy().transpose(0, 2, 1, 3)
                ours = got[f"attentions.{layer}"].transpose(0, 2, 1, 3)
                np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=1e-5)


def test_embedding_has_no_hidden_states():
    config = Config(head="embedding", output_hidden_states=True)
    with pytest.raises(UsageError, match="an embedding has no hidden_states; compile the model"):
        cached.export_cached("synthetic:bert-tiny", config)


@pytest.mark.slow  # quick: a family's, in test_exporter.py
def test_head_of_pretraining_gives_all_that_its_model_does(stages):
    config = Config(head="pretraining", cache_dir=stages)
    exported = cached.export_cached("synthetic:bert-tiny", config)
    assert exported.outputs == ("prediction_logits", "seq_relationship_logits")
    model = checkpoints.load("synthetic:bert-tiny", "pretraining").model
    arrays = sample(exported.inputs, 2, 9, 0)
    with torch.no_grad():
        want = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    got, real = run_onnx(exported.onnx_path, arrays), arrays["attention_mask"] == 1
    words = want.prediction_logits.numpy()
    np.testing.assert_allclose(got["prediction_logits"][real], words[real], rtol=0, atol=1e-4)
    next_sentence = want.seq_relationship_logits.numpy()
    np.testing.assert_allclose(got["seq_relationship_logits"], next_sentence, rtol=0, atol=1e-4)
