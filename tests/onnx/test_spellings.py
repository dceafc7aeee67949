"""One encoder as exporters spell it: each becomes the same operators, and computes the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import spelled_encoder as spelled
from helpers.foreign_forms import operators
from helpers.tokens_beside_padding import assert_equal, compiled

from bertile.config import Config
from bertile.onnx import normalizer

FORMS = {
    "as torch has it": spelled.Encoder,
    "rows of tokens": spelled.Flat,
    "sums, powers and squares": spelled.Summed,
    "einsums": spelled.Einsums,
    "a matrix for each head": spelled.Stacked,
    "batched products": spelled.Batched,
}
CUTS = ("split", "slice", "unbind", "head")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("spelled")
    paths = {}
    for name, module in FORMS.items():
        paths[name] = spelled.write(directory / f"{module.__name__}.onnx", module())
    for cut in CUTS:
        module = spelled.Together()
        module.cut = cut
        paths[cut] = spelled.write(directory / f"{cut}.onnx", module)
    return paths


@pytest.mark.parametrize("form", [*FORMS, *CUTS])
def test_each_spelling_becomes_the_same_operators(files, form, tmp_path):
    exported = normalizer.normalize(files[form], tmp_path, Config())
    counts = Counter(operators(onnx.load(exported.onnx_path)))
    layer = {"MatMul": 8, "Reshape": 4, "Transpose": 4, "Softmax": 1, "Gelu": 1}
    assert {name: counts[name] for name in layer} == {n: 2 * c for n, c in layer.items()}
    assert counts["LayerNormalization"] == 5 and counts["Gather"] == 3 and counts["Slice"] == 1
    unwanted = {"Einsum", "Gemm", "Split", "Squeeze", "ReduceMean", "Sqrt", "Pow", "Expand", "Erf"}
    assert not unwanted & set(counts)
    assert exported.max_length == spelled.PLACES
    assert [spec.below for spec in exported.inputs] == [spelled.WORDS, 2, 2]


def test_a_mask_of_ids_is_one_by_keys(tmp_path):
    """Which keys are closed is a tensor of the graph, and no attention_mask is read."""
    path = spelled.write(tmp_path / "m.onnx", spelled.Paddle())
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    assert [spec.name for spec in exported.inputs] == ["input_ids", "token_type_ids"]
    assert not any("is kept as it is" in note for note in exported.notes)
    counts = Counter(operators(onnx.load(exported.onnx_path)))
    assert counts["Equal"] == 1 and not {"CumSum", "Where", "Expand"} & set(counts)


@pytest.mark.parametrize("dynamic", [(), ("batch",), ("length",)])
@pytest.mark.parametrize("module", [spelled.Flat, spelled.Batched], ids=["rows", "batched"])
def test_static_axes_come_to_the_same(module, dynamic, tmp_path):
    path = spelled.write(tmp_path / "m.onnx", module(layers=1), dynamic=dynamic)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    counts = Counter(operators(onnx.load(exported.onnx_path)))
    assert (counts["Reshape"], counts["Transpose"]) == (4, 4)
    assert (counts["LayerNormalization"], counts["Mul"]) == (3, 2)
    sizes = (None if "batch" in dynamic else 2, None if "length" in dynamic else 16)
    assert (exported.batch, exported.length) == sizes


def test_names_of_weights_stay(files, tmp_path):
    exported = normalizer.normalize(files["rows of tokens"], tmp_path, Config())
    names = {tensor.name for tensor in onnx.load(exported.onnx_path).graph.initializer}
    assert {"words", "first.0", "first.1", "layers.0.qkv.0.0", "layers.1.norms.1.1"} <= names


FUSED = {"attention", "dense", "embedding", "layer_norm"}


@pytest.mark.parametrize(
    ("form", "precision"),
    [
        ("rows of tokens", "fp32"),
        *(
            pytest.param(form, precision, marks=pytest.mark.slow)
            for form in [*FORMS, *CUTS]
            for precision in ("fp32", "int8")
            if (form, precision) != ("rows of tokens", "fp32")
        ),
    ],
)
def test_each_spelling_is_fused_and_computes_the_same(files, form, precision, tmp_path, cache):
    model = compiled(files[form], tmp_path, cache, precision=precision)
    assert {kernel["operation"] for kernel in model.manifest["kernels"]} >= FUSED
    fallen = {entry.partition(" ")[0] for entry in model.manifest["fallthrough"]}
    assert fallen <= {
        "astype",
        "expand_dims",
        "subtract",
        "multiply",
        "strided_slice",
    }  # mask, places
    assert_equal(model, files[form], tolerance=2e-5 if precision == "fp32" else 0.2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_other_ids_and_norms_of_odd_epsilon(tmp_path, dtype):
    path = spelled.write(tmp_path / "m.onnx", spelled.Flat(layers=1, eps=3e-3), dtype=dtype)
    exported = normalizer.normalize(path, tmp_path / "out", Config())
    norms = [n for n in onnx.load(exported.onnx_path).graph.node if "Norm" in n.op_type]
    values = [a.f for node in norms for a in node.attribute if a.name == "epsilon"]
    np.testing.assert_allclose(values, 3e-3, rtol=1e-6)
