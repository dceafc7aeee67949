"""Model types without a row: exported by config and signature, against transformers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bertile.base.errors import ModelError, UsageError
from bertile.config import Config
from bertile.export import cached, checkpoints, pruning
from bertile.onnx.samples import run_onnx
from bertile.studies import model_types

TYPES = (
    "ibert",  # positions behind the padding id, which its config alone does not tell
    pytest.param("fnet", marks=pytest.mark.slow),  # without a mask
    pytest.param("t5", marks=pytest.mark.slow),  # the encoder of two halves
    pytest.param("gpt_neox", marks=pytest.mark.slow),  # a decoder
)


@pytest.fixture(scope="module", params=TYPES)
def saved(request, tmp_path_factory) -> tuple[object, Path]:
    """A tiny model of a type, and the directory that it was saved into."""
    model = model_types.tiny(request.param)
    path = tmp_path_factory.mktemp("saved") / request.param
    model.save_pretrained(path)
    return model, path


def test_export_answers_as_transformers_does(saved, tmp_path):
    model, path = saved
    exported = cached.export_cached(str(path), Config(cache_dir=str(tmp_path), head="encoder"))
    assert exported.family == model.config.model_type
    assert any("has no row of its own" in note for note in exported.notes)
    positions = getattr(model.config, "max_position_embeddings", None)
    if model.config.model_type == "ibert":  # as RoBERTa, but told by no row
        positions -= model.config.pad_token_id + 1
    assert exported.max_length == positions
    names = {spec.name for spec in exported.inputs}
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    lengths = (1, 7, 50, exported.max_length or 60)
    for seed, length in enumerate(lengths):
        for left in (False, True):
            arrays = model_types.batch(3, length, names, left, seed, model)
            with torch.no_grad():
                want = encoder(**{k: torch.from_numpy(v) for k, v in arrays.items()})
            got = run_onnx(exported.onnx_path, arrays)["last_hidden_state"]
            real = arrays.get("attention_mask", np.ones_like(arrays["input_ids"])) == 1
            want = want.last_hidden_state.numpy()
            np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-4)


def test_encoder_that_is_no_model_by_itself_is_refused(tmp_path):
    model_types.tiny("fsmt").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the encoder of a 'fsmt' is no model by itself"):
        checkpoints.load(str(tmp_path), "encoder")


def test_head_that_a_type_lacks_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match="'gpt2' have no head 'masked-lm'; known: encoder, embed"):
        checkpoints.check(str(tmp_path), "masked-lm")


def test_pruning_refuses_a_type_whose_layers_no_row_names():
    with pytest.raises(ModelError, match="a model of type 'fnet' cannot be pruned"):
        pruning.prune(None, "fnet", 0.5, "1x1")


OWN_CODE = '''
import torch
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

class DoublingConfig(PretrainedConfig):
    model_type = "{model_type}"

class DoublingModel(PreTrainedModel):
    """Twice the embedding of each real token."""

    config_class = DoublingConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, **others):
        hidden = 2 * self.words(input_ids) * attention_mask[:, :, None]
        return BaseModelOutput(last_hidden_state=hidden)
'''


@pytest.fixture(params=["bert", "doubling"])
def own_code(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """A directory with a model whose code lies beside it, of a type that is known or not."""
    path = tmp_path / "own"
    path.mkdir()
    (path / "modeling_doubling.py").write_text(OWN_CODE.replace("{model_type}", request.param))
    config = {
        "model_type": request.param,
        "architectures": ["DoublingModel"],
        "auto_map": {
            "AutoConfig": "modeling_doubling.DoublingConfig",
            "AutoModel": "modeling_doubling.DoublingModel",
        },
        "vocab_size": 30,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    words = torch.randn(30, 8)
    from safetensors.torch import save_file

    save_file({"words.weight": words}, path / "model.safetensors", {"format": "pt"})
    return path, words


def test_code_of_a_checkpoint_runs_only_where_the_user_says_so(own_code, tmp_path, monkeypatch):
    path, words = own_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    config = Config(cache_dir=str(tmp_path / "cache"))
    said = r"code of its own \(auto_map, AutoConfig: .*\); --trust-remote-code runs that code"
    with pytest.raises(ModelError, match=said):
        cached.export_cached(str(path), config)
    assert not (tmp_path / "m").exists()
    trusting = Config(cache_dir=str(tmp_path / "cache"), trust_remote_code=True)
    exported = cached.export_cached(str(path), trusting)
    assert exported.family == checkpoints.OWN_CODE
    assert any("computed by code of its own" in note for note in exported.notes)
    ids, mask = np.asarray([[3, 4, 5], [6, 7, 0]]), np.asarray([[1, 1, 1], [1, 1, 0]])
    feed = {"input_ids": ids, "attention_mask": mask}
    got = run_onnx(exported.onnx_path, feed)["last_hidden_state"]
    np.testing.assert_allclose(got, 2 * words.numpy()[ids] * mask[:, :, None], rtol=1e-6)
    shutil.rmtree(tmp_path / "cache")
