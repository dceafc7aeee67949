"""Heads removed for good: what such a directory computes, in every family that can lack them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import family_models
from safetensors.torch import load_file, save_file

import bertile
from bertile.base.errors import ModelError
from bertile.config import Config
from bertile.export import cached, checkpoints
from bertile.families.family import BY_ANGLE, BY_DISTANCE
from bertile.families.table import FAMILIES, named
from bertile.onnx.samples import largest_difference, run_onnx, sample

TOLERANCE = 5e-5
# MPNet's bias by distance has a row for each head of every layer, so that none can be removed.
NAMES = [
    family.name
    for family in FAMILIES
    # which are too new for such files, tell the heads of every layer apart, or are no encoder
    if family.name != "mpnet"
    and family.positions not in (BY_ANGLE, BY_DISTANCE)
    and not family.causal
]
HEADS, WIDTH = 4, 32  # of the tiny models' 128


def without_heads(family: str, stages: str, directory: Path, removed: dict) -> tuple[Path, object]:
    """A directory as transformers saved it after prune_heads, and the model with those at zero."""
    source = family_models.directory(f"{family}-tiny", "encoder", stages)
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    config["n_heads" if "n_heads" in config else "num_attention_heads"] = HEADS
    (directory / "config.json").write_text(json.dumps(config))
    model = checkpoints.load(directory).model
    held = load_file(directory / "model.safetensors")
    layers = named(family).encoder_layers(model)
    for layer, heads in removed.items():
        *into, out = list(layers[int(layer)].items())[:4]
        left = [row for row in range(128) if row // WIDTH not in heads]
        gone = [row for row in range(128) if row // WIDTH in heads]
        for name, linear in into:
            for part in ("weight", "bias"):
                held[f"{name}.{part}"] = held[f"{name}.{part}"][left].contiguous()
                with torch.no_grad():
                    getattr(linear, part)[gone] = 0
        name, linear = out
        held[f"{name}.weight"] = held[f"{name}.weight"][:, left].contiguous()
        with torch.no_grad():
            linear.weight[:, gone] = 0
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    config["pruned_heads"] = removed
    (directory / "config.json").write_text(json.dumps(config))
    return directory, model


def test_families_that_never_had_such_files_are_refused_by_name(stages, tmp_path):
    shutil.copytree(family_models.directory("modernbert-tiny", "encoder", stages), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["pruned_heads"] = {"0": [1]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="pruned_heads of ModernBERT is unsupported"):
        checkpoints.load(tmp_path / "m")


@pytest.mark.parametrize(
    "family",
    ["albert", *(pytest.param(f, marks=pytest.mark.slow) for f in NAMES if f != "albert")],
)
def test_export_without_heads_equals_the_model_with_those_at_zero(family, stages, tmp_path):
    removed = {"0": [1, 3]} if family == "albert" else {"0": [1, 3], "1": [0]}
    directory, model = without_heads(family, stages, tmp_path / "model", removed)
    exported = cached.export_cached(str(directory), Config(cache_dir=stages))
    arrays = sample(exported.inputs, 3, 21, family_models.padding_id(exported))
    want = family_models.torch_outputs(model, "encoder", arrays)
    for output, got in run_onnx(exported.onnx_path, arrays).items():
        assert largest_difference(got, want[output], arrays["attention_mask"]) < TOLERANCE, output


@pytest.mark.slow
def test_bundle_without_heads_equals_the_model_with_those_at_zero(stages, tmp_path):
    directory, model = without_heads("bert", stages, tmp_path / "model", {"0": [1, 3], "1": [0]})
    bertile.compile(str(directory), tmp_path / "bundle", Config(cache_dir=stages))
    compiled = bertile.load(tmp_path / "bundle")
    kernels = [kernel["shape"] for kernel in compiled.manifest["kernels"]]
    assert {shape["heads"] for shape in kernels if "heads" in shape} == {2, 3}
    exported = cached.export_cached(str(directory), Config(cache_dir=stages))
    arrays = sample(exported.inputs, 3, 21, 0)
    want = family_models.torch_outputs(model, "encoder", arrays)
    for output, got in compiled(**arrays).items():
        assert largest_difference(got, want[output], arrays["attention_mask"]) < TOLERANCE, output


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"7": [0]}, "pruned_heads names layer 7, the model has 2"),
        ({"0": [4]}, "names .4. of layer 0, which has 4 heads"),
        ({"0": [0, 1, 2, 3]}, "names .0, 1, 2, 3. of layer 0, which has 4 heads"),
        ({"1": [0]}, r"has the shape .* config\.json says \[128, 128\]"),
    ],
)
def test_load_refuses_heads_that_cannot_be_missing(stages, tmp_path, removed, message):
    directory, _ = without_heads("bert", stages, tmp_path / "model", {"0": [2]})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "pruned_heads": removed}))
    with pytest.raises(ModelError, match=message):
        checkpoints.load(directory)
