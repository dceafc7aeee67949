"""Whole models in 4 bits: one whose weights are on the grid already is off by its inputs' bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import family_models

import bertile
from bertile import loader
from bertile.config import Config
from bertile.export.cached import export_cached
from bertile.onnx.samples import sample

ODD = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6}


def on_the_grid(model: torch.nn.Module, size: int) -> None:
    """Give every linear layer levels -8 to 7 times a power of two for each group of its inputs."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            outputs, inputs = layer.weight.shape
            levels = torch.randint(-8, 8, (outputs, inputs), generator=generator)
            levels[:, ::size] = -8
            groups = -(-inputs // size)
            scale = 2.0 ** torch.randint(-8, -5, (outputs, groups), generator=generator)
            wide = scale.repeat_interleave(size, 1)[:, :inputs]
            layer.weight.data = (levels * wide).to(layer.weight.dtype)


@pytest.fixture(scope="module", params=[32, pytest.param(64, marks=pytest.mark.slow)])
def both(request, tmp_path_factory, stages):
    """A model of odd widths on the grid in groups of that size, and its bundle."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {"vocab_size": 200, "num_hidden_layers": 2, "max_position_embeddings": 128, **ODD}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    on_the_grid(model, request.param)
    place = tmp_path_factory.mktemp("grid")
    model.save_pretrained(place / "model")
    config = Config(precision="int4", group_size=request.param, cache_dir=stages)
    bertile.compile(place / "model", place / "bundle", config)
    exported = export_cached(str(place / "model"), Config(cache_dir=stages))
    return model, exported, place / "bundle"


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 37), (2, 128)])
def test_answers_are_those_of_torch_but_for_the_bytes_of_inputs(both, batch, length):
    model, exported, bundle = both
    arrays = sample(exported.inputs, batch, length, 0, seed=length)
    (got,) = bertile.load(bundle)(**arrays).values()
    (want,) = family_models.torch_outputs(model, "encoder", arrays).values()
    mask = arrays["attention_mask"] != 0
    got, want = got[mask], want[mask]
    cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine.mean() > 0.999 and cosine.min() > 0.995


def test_bundle_says_its_kernels_and_layers_are_in_four_bits(both):
    manifest = loader.read_manifest(both[2])
    products = [k["shape"] for k in manifest["kernels"] if k["operation"] == "dense"]
    assert {shape["precision"] for shape in products} == {"int4"}
    assert all(row["weight dB"] > 100 for row in manifest["quantization"]["layers"])
