"""ModernBERT of odd sizes in every precision against torch, however its texts are padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers import family_models

import bertile
from bertile import backends
from bertile.backends.cpu import precision_plan
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.lower import lowering
from bertile.onnx.samples import largest_difference
from bertile.targets.rows import resolve

LIMIT = 200
ODD = {
    "vocab_size": 100,
    "hidden_size": 60,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    # by the kind of layer, not by every third
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "local_attention": 10,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1),
}
BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), True)
PADDINGS = ("right", "left", "holes")
SHAPES = ((1, 1), (3, 37), (2, 16), (1, LIMIT))


def saved(directory, head="", **more):
    """A model with random weights, biases too, as save_pretrained writes it; and itself."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"ModernBert{head or 'Model'}")
    with quiet():
        model = kind(transformers.ModernBertConfig(**{**ODD, **more})).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(directory)
    return model


def batch(rows, length, padding):
    """Ids and a mask with places that are masked, and rows without any."""
    rng = np.random.default_rng(length)
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    places = np.arange(length)
    mask = places < lengths[:, None]
    if padding == "left":
        mask = mask[:, ::-1]
    elif padding == "holes":
        mask = rng.random((rows, length)) < 0.5
        mask[:, rng.integers(0, length)] = True
    ids = np.where(mask, rng.integers(2, 100, (rows, length)), 0)
    return {"input_ids": ids, "attention_mask": mask.astype("int64")}


def assert_equals_torch(bundle, model, shapes=SHAPES, tolerance=2e-5):
    for rows, length in shapes:
        for padding in PADDINGS:
            arrays = batch(rows, length, padding)
            want = family_models.torch_outputs(model, "", arrays)
            got = bundle(**arrays)
            for name, value in got.items():
                difference = largest_difference(value, want[name], arrays["attention_mask"])
                limit = tolerance * max(1, np.abs(want[name]).max())
                assert difference <= limit, (name, rows, length, padding)


def shapes_of(bundle, operation):
    return [k["shape"] for k in bundle.manifest["kernels"] if k["operation"] == operation]


@pytest.mark.slow
@pytest.mark.parametrize("biases", [True, False])
def test_odd_sizes_equal_torch_however_texts_are_padded(tmp_path, biases):
    model = saved(tmp_path / "model", **(BIASES if biases else {}))
    config = Config(cache_dir=str(tmp_path / "cache"))
    bertile.compile(str(tmp_path / "model"), tmp_path / "bundle", config)
    bundle = bertile.load(tmp_path / "bundle")
    assert_equals_torch(bundle, model)
    assert [k.get("window") for k in shapes_of(bundle, "attention")] == [5, None]
    products = shapes_of(bundle, "dense")
    assert [bool(p.get("turned")) for p in products] == [True, False, False, False]
    assert [bool(p.get("gated")) for p in products] == [False, False, True, False]
    # masks and the angles of places are made once a request; nothing of a layer is left
    left = {entry.partition(" ")[0] for entry in bundle.manifest["fallthrough"]}
    assert left <= {"astype", "expand_dims", "subtract", "multiply", "strided_slice"}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
def test_heads_that_pool_by_the_mean_equal_torch(tmp_path, head):
    model = saved(tmp_path / "model", f"For{head}", classifier_pooling="mean")
    config = Config(cache_dir=str(tmp_path / "cache"))
    bertile.compile(str(tmp_path / "model"), tmp_path / "bundle", config)
    bundle = bertile.load(tmp_path / "bundle")
    for rows, length in SHAPES:
        arrays = batch(rows, length, "right")
        choices = head == "MultipleChoice"
        asked = {k: v[:, None] if choices else v for k, v in arrays.items()}
        want = family_models.torch_outputs(model, "", asked)["logits"]
        np.testing.assert_allclose(bundle(**arrays)["logits"], want, atol=1e-4)


TINY = "modernbert-tiny", family_models.HEAD_OF["modernbert"]  # which other tests export too


@pytest.fixture(scope="module")
def graph(stages):
    return optimize(import_onnx(family_models.exported(*TINY, stages)))


def planned(graph, row, precision):
    graph = precision_plan.plan_layers(graph, precision, row, None, "off")
    return [task for task in lowering.tasks(backends.of(row).forms(graph))]


def test_a_layer_is_six_operators_beside_its_norms(graph):
    tasks = planned(graph, resolve("x86-avx512", threads=1), "fp32")
    windows = {t.shape.get("window") for t in tasks if t.operation == "attention"}
    assert windows == {None, 8}
    products = [t.shape for t in tasks if t.operation == "dense" and t.shape["outputs"] > 128]
    (qkv,) = (shape for shape in products if shape.get("turned"))
    assert (qkv["outputs"], qkv["turned"], qkv["head_size"]) == (3 * 128, 4, 64)
    (gated,) = (shape for shape in products if shape.get("gated"))
    assert (gated["outputs"], gated["activation"]) == (2 * 512, "gelu")
    names = {name for name in graph.params if "layers.1." in name}
    assert names == {
        f"model.model.layers.1.{layer}.weight"
        for layer in ("attn_norm", "attn.Wqkv.1_2_3", "attn.Wo", "mlp_norm", "mlp.Wi.1_2", "mlp.Wo")
    }


def test_precisions_reach_both_epilogues(graph):
    row = resolve("x86-avx512-bf16", threads=1)
    tasks = planned(graph, row, "bf16")
    shapes = [task.shape for task in tasks if task.operation == "dense"]
    (qkv,) = (shape for shape in shapes if "turned" in shape)
    assert (qkv["precision"], qkv["writes"], qkv["values_from"]) == ("bf16", "to_bf16", 256)
    (gated,) = (shape for shape in shapes if "gated" in shape)
    assert (gated["precision"], gated["writes"]) == ("bf16", "to_bf16")
    attention = [task.shape for task in tasks if task.operation == "attention"]
    assert [shape["precision"] for shape in attention] == ["bf16", "bf16"]
    products = [t.shape for t in planned(graph, row, "int8") if t.operation == "dense"]
    of_layers = [shape for shape in products if shape["outputs"] >= 128]
    assert {shape["precision"] for shape in of_layers} == {"int8"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"precision": "bf16"}, 0.999),
        ({"precision": "int8"}, 0.99),
        ({"precision": "int8", "ranges": "minmax"}, 0.98),
        ({"precision": "int8", "smooth": 0.5}, 0.99),
        ({"precision": "int4"}, 0.8),
        ({"sparse": "always"}, 0.9999999),
    ],
    ids=str,
)
def test_other_precisions_are_near_torch(tmp_path, options, cosine):
    model = saved(tmp_path / "model", intermediate_size=64, hidden_size=96)
    if {"ranges", "smooth"} & set(options):
        np.savez(tmp_path / "some.npz", **batch(32, 60, "right"))
        options = {**options, "calibrate": str(tmp_path / "some.npz")}
    config = Config(cache_dir=str(tmp_path / "cache"), **options)
    bertile.compile(str(tmp_path / "model"), tmp_path / "bundle", config)
    bundle = bertile.load(tmp_path / "bundle")
    arrays = batch(3, 90, "right")
    real = arrays["attention_mask"] != 0
    got = bundle(**arrays)["last_hidden_state"][real]
    want = family_models.torch_outputs(model, "", arrays)["last_hidden_state"][real]
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > cosine


@pytest.mark.slow
def test_all_8192_tokens_equal_torch(tmp_path):
    more = {"max_position_embeddings": 8192, "local_attention": 128, "num_hidden_layers": 3}
    model = saved(tmp_path / "model", **more)
    with quiet():
        model.set_attn_implementation("sdpa")
    config = Config(cache_dir=str(tmp_path / "cache"))
    bertile.compile(str(tmp_path / "model"), tmp_path / "bundle", config)
    bundle = bertile.load(tmp_path / "bundle")
    assert_equals_torch(bundle, model, ((1, 8192), (2, 700)), tolerance=1e-4)
