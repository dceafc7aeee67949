"""What save_pretrained writes of each family, through the whole program, against torch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import family_models

import bertile
from bertile import loader
from bertile.config import Config
from bertile.families.table import FAMILIES, named
from bertile.onnx.samples import largest_difference, sample

SHAPES = ((1, 1), (1, 511), (7, 33), (3, 16))
# BERT is compiled with every head by tests/test_compile.py.
QUICK = [
    (family.name, family_models.HEAD_OF[family.name])
    for family in FAMILIES[1:]
    if family.kernels_of is None
]
REST = [case for case in family_models.PAIRS if case not in QUICK]
TOLERANCE = 5e-5  # two layers in float32, relative to the largest value of the output


def compiled(name: str, head: str, stages: str, output) -> loader.Model:
    config = Config(head=head, cache_dir=stages)
    bertile.compile(str(family_models.directory(name, head, stages)), output, config)
    return bertile.load(output)


def assert_equals_torch(model: loader.Model, name: str, head: str, stages: str) -> None:
    exported = family_models.exported(name, head, stages)
    untouched, padding = family_models.untouched(name, head), family_models.padding_id(exported)
    for batch, length in SHAPES:
        arrays = sample(exported.inputs, batch, length, padding, seed=length)
        got, want = model(**arrays), family_models.torch_outputs(untouched, head, arrays)
        assert set(got) <= set(want)
        for output, value in got.items():
            difference = largest_difference(value, want[output], arrays["attention_mask"])
            limit = TOLERANCE * max(1, np.abs(want[output]).max())
            assert difference <= limit, (output, batch, length)


@pytest.mark.parametrize(
    ("family", "head"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_directory_compiles_and_equals_torch(family, head, stages, tmp_path):
    name = f"{family}-tiny"
    model = compiled(name, head, stages, tmp_path / "bundle")
    assert_equals_torch(model, name, head, stages)
    described = model.manifest["model"]
    assert (described["family"], described["head"]) == (family, head)
    settled = (named(family).prepare or (lambda _: ()))(family_models.untouched(name))
    assert set(settled) <= set(model.manifest["notes"])
    kinds = {kernel["operation"] for kernel in model.manifest["kernels"]}
    assert {"dense", "attention", "layer_norm"} <= kinds
