"""ONNX files of other exporters, through the whole program: the kernels fuse, the numbers agree."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import tvm
from helpers import foreign_forms as forms
from helpers.family_models import OTHERS, has_types
from transformers.models.bert import modeling_bert

import bertile
from bertile import loader
from bertile.base.errors import ModelError
from bertile.bundle import manifest
from bertile.config import Config
from bertile.export import synthetic
from bertile.families.family import BY_DISTANCE
from bertile.families.table import named
from bertile.onnx.exported import InputSpec
from bertile.onnx.samples import largest_difference, sample, session

TOLERANCE = 5e-5  # two layers in float32, relative to the largest value of the output
FUSED = {"embedding", "dense", "attention", "layer_norm"}
SHAPES = ((1, 1), (3, 37), (2, 16), (1, 511))


# Each exporter once: tests/onnx/test_normalizer.py shows that all forms become the same operators.
FORMS = {
    "TorchScript at opset 13, int32 inputs, no token_type_ids": dict(
        attention="eager", opset=13, dtype=torch.int32, types=False
    ),
}
SLOW_FORMS = {
    "dynamo at opset 18": dict(dynamo=True, opset=18, layers=1),
    "dynamo at opset 18, 2 layers": dict(dynamo=True, opset=18),
    "TorchScript at opset 13": dict(attention="eager", opset=13),
    "TorchScript at opset 17": dict(opset=17),
    "no token_type_ids": dict(types=False),
    "int32 inputs": dict(dtype=torch.int32),
    "dynamo at opset 18, eager": dict(dynamo=True, opset=18, attention="eager"),
    "dynamo at opset 20, int32 inputs": dict(dynamo=True, opset=20, dtype=torch.int32),
    "dynamo at opset 23": dict(dynamo=True, opset=23),
    "dynamo, static": dict(dynamo=True, opset=18, dynamic=False),
    "dynamo, no token_type_ids": dict(dynamo=True, opset=18, types=False),
    "TorchScript at opset 17, eager": dict(attention="eager", opset=17),
    "TorchScript, static batch of 2": dict(opset=17, dynamic=False),
    "int32 inputs, no token_type_ids": dict(dtype=torch.int32, types=False, opset=17),
    "as optimum writes it": dict(head="sequence-classification", opset=14),
    "masked-lm": dict(head="masked-lm", opset=17),
    **{
        name: dict(name=f"{name}-tiny", types=has_types(named(name)), opset=17)
        for name in OTHERS
        if named(name).positions != BY_DISTANCE  # whose own code is not followed
    },
    "distilbert, eager at opset 13": dict(
        name="distilbert-tiny", types=False, attention="eager", opset=13
    ),
    "mpnet, static": dict(name="mpnet-tiny", types=False, dynamic=False),
}


@pytest.fixture
def compiled(tmp_path):
    def compile_file(path: Path) -> loader.Model:
        bertile.compile(
            str(path),
            tmp_path / "bundle",
            Config(cache_dir=str(tmp_path / "cache"), runtime="none"),
        )
        return bertile.load(tmp_path / "bundle")

    return compile_file


def reference(path: Path, arrays: dict, static: dict) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of the file as it came; a static one is fed padded, in its size."""
    peer = session(path)
    types = {argument.name: argument.type for argument in peer.get_inputs()}
    batch, length = arrays["input_ids"].shape
    step, width = static["batch"] or batch, static["length"] or length
    pieces = []
    for first in range(0, batch, step):
        feed = {}
        for name, kind in types.items():
            value = np.zeros((step, width), "int32" if "int32" in kind else "int64")
            part = arrays.get(name, value)[first : first + step, :length]
            value[: len(part), : part.shape[1]] = part
            feed[name] = value
        pieces.append(peer.run(None, feed))
    names = [output.name for output in peer.get_outputs()]
    results = {name: np.concatenate(parts)[:batch] for name, parts in zip(names, zip(*pieces))}
    per_token = {name for name, value in results.items() if value.ndim > 2}
    return {
        name: value[:, :length] if name in per_token else value for name, value in results.items()
    }


def assert_equals_original(model: loader.Model, path: Path, shapes) -> None:
    specs = [InputSpec(**spec) for spec in model.manifest["inputs"]]
    for batch, length in shapes:
        arrays = sample(specs, batch, length, 1, seed=batch + length)
        mask = arrays.get("attention_mask", np.ones((batch, length)))
        got, want = model(**arrays), reference(path, arrays, model.manifest["static"])
        assert set(got) == set(want)
        for name, array in want.items():
            tolerance = TOLERANCE * max(1, np.abs(array).max())
            assert largest_difference(got[name], array, mask) <= tolerance, (name, batch, length)


def operations(model: loader.Model) -> set[str]:
    return {kernel["operation"] for kernel in model.manifest["kernels"]}


def fallen(model: loader.Model) -> set[str]:
    """The operators that no schedule covers, without the variables they define."""
    return {entry.partition(" ")[0] for entry in model.manifest["fallthrough"]}


def assert_fused(model: loader.Model) -> None:
    assert operations(model) >= FUSED
    assert not fallen(model) & {"matmul", "nn.softmax", "nn.layer_norm", "erf", "nn.gelu"}


@pytest.mark.parametrize(
    "form", [*FORMS, *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW_FORMS)]
)
def test_foreign_file_fuses_and_equals_onnxruntime(tmp_path, compiled, form):
    options = {**FORMS, **SLOW_FORMS}[form]
    path = forms.write(tmp_path / "m.onnx", **options)
    model = compiled(path)
    dynamic = options.get("dynamic", True)
    sizes = (None, None) if dynamic else (2, 16)
    assert tuple(model.manifest["static"].values()) == sizes
    assert_fused(model)
    assert_equals_original(model, path, SHAPES if dynamic else ((2, 16), (1, 5), (5, 16)))


def test_static_batch_of_1_takes_shorter_and_more_sequences(tmp_path, compiled):
    path = trace(tmp_path / "m.onnx", one_layer(), batch=1, dynamic=False)
    model = compiled(path)
    assert model.manifest["static"] == {"batch": 1, "length": 16}
    assert_fused(model)
    assert_equals_original(model, path, ((1, 16), (1, 5), (3, 16), (3, 9)))


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("last_hidden_state", (1, 16, 128), ["batch", "length", 128]),
        ("pooler_output", (1, 16), ["batch", 16]),  # as many channels as tokens
        ("start_logits", (1, 16), ["batch", "length"]),
    ],
)
def test_static_axes_of_outputs_are_named(name, shape, axes):
    exported = SimpleNamespace(batch=1, length=16)
    assert (
        manifest._axes(exported, name, [tvm.tirx.IntImm("int64", size) for size in shape]) == axes
    )


def test_an_activation_without_a_kernel_goes_the_generic_way(tmp_path, compiled):
    path = trace(tmp_path / "m.onnx", one_layer(hidden_act="quick_gelu"))
    model = compiled(path)
    assert operations(model) >= {*FUSED, "generic"}
    assert "sigmoid" in fallen(model) and not fallen(model) & {"matmul", "nn.softmax"}
    assert_equals_original(model, path, SHAPES)


@pytest.mark.slow
def test_attention_that_divides_after_its_mask_goes_the_generic_way(
    tmp_path, compiled, monkeypatch
):
    def divided(module, query, key, value, attention_mask, scaling=None, **options):
        scores = torch.matmul(query, key.transpose(2, 3)) + attention_mask
        weights = torch.softmax(scores / 8.0, dim=-1)
        return torch.matmul(weights, value).transpose(1, 2), weights

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", divided)
    path = trace(tmp_path / "m.onnx", one_layer())
    model = compiled(path)
    assert operations(model) >= {"embedding", "dense", "layer_norm", "generic"}
    assert "attention" not in operations(model)
    assert fallen(model) >= {"matmul", "divide", "nn.softmax"}
    assert_equals_original(model, path, SHAPES)


def test_mask_that_rows_decide_is_computed_as_it_is(tmp_path, compiled):
    path = forms.write_attention(tmp_path / "m.onnx", forms.prefixed)
    assert_equals_original(compiled(path), path, SHAPES[:3])


def test_an_operator_that_tvm_cannot_import_is_refused_by_its_name(tmp_path, compiled):
    def counted(scores, mask):  # numbers up to one that the mask decides
        return scores + torch.arange(mask.sum()).float().sum()

    path = forms.write_attention(tmp_path / "m.onnx", counted)
    with pytest.raises(ModelError, match=r"TVM cannot import operator [A-Z][a-z]+: "):
        compiled(path)
    assert not (tmp_path / "bundle").exists()


def one_layer(**changes):
    """The configuration of the tiny model of BERT with one layer, and changed otherwise."""
    config = synthetic.config("bert-tiny")
    config.update({"num_hidden_layers": 1, **changes})
    return config


def trace(path: Path, config, batch: int = 2, dynamic: bool = True) -> Path:
    """Write the model of a transformers configuration as torch's TorchScript exporter does."""
    model = synthetic.build(transformers.AutoModel, config)
    ids = torch.arange(16 * batch).reshape(batch, 16) + 5
    arrays = (ids, (torch.arange(16) < 9 * torch.ones_like(ids)).long(), ids % 2)
    names, outputs = list(forms.INPUTS), ["last_hidden_state", "pooler_output"]
    options = {"dynamo": False, "opset_version": 17, "input_names": names, "output_names": outputs}
    if dynamic:
        axes = {0: "batch_size", 1: "sequence_length"}
        options["dynamic_axes"] = {name: axes for name in (*names, outputs[0])}
        options["dynamic_axes"] |= {outputs[1]: {0: "batch_size"}}
    forms.run_quietly(forms.Positional(model, forms.INPUTS).eval(), arrays, path, options)
    return path
