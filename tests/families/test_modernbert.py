"""ModernBERT of odd sizes in every precision against torch, however its texts are padded."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import family_models, odd_models
from helpers.odd_models import (
    LIMIT,
    ONCE,
    SHAPES,
    assert_equals_torch,
    batch,
    compiled,
    cosine_with_torch,
    left_to_tvm,
    planned,
    shapes_of,
)

from bertile.base.quiet import quiet
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.quantize.quantizer import smoothable
from bertile.targets.rows import resolve

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


def saved(directory, head="Model", **more):
    """A model of ODD's sizes, as `odd_models.saved`."""
    sizes = {**ODD, **more}
    return odd_models.saved(directory, f"ModernBert{head}", "ModernBertConfig", sizes)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [True, False])
def test_odd_sizes_equal_torch_however_texts_are_padded(tmp_path, biases):
    model = saved(tmp_path / "model", **(BIASES if biases else {}))
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model)
    assert [k.get("window") for k in shapes_of(bundle, "attention")] == [5, None]
    products = shapes_of(bundle, "dense")
    assert [bool(p.get("turned")) for p in products] == [True, False, False, False]
    assert [bool(p.get("gated")) for p in products] == [False, False, True, False]
    # masks and the angles of places are made once a request; nothing of a layer is left
    assert left_to_tvm(bundle) <= ONCE


@pytest.mark.slow
@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
def test_heads_that_pool_by_the_mean_equal_torch(tmp_path, head):
    model = saved(tmp_path / "model", f"For{head}", classifier_pooling="mean")
    bundle = compiled(tmp_path)
    for rows, length in SHAPES:
        arrays = batch(rows, length, "right")
        choices = head == "MultipleChoice"
        asked = {k: v[:, None] if choices else v for k, v in arrays.items()}
        want = odd_models.answers(model, asked)["logits"]
        np.testing.assert_allclose(bundle(**arrays)["logits"], want, atol=1e-4)


TINY = "modernbert-tiny", family_models.HEAD_OF["modernbert"]  # which other tests export too


@pytest.fixture(scope="module")
def graph(stages):
    return optimize(import_onnx(family_models.exported(*TINY, stages)))


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


def test_smoothing_reaches_norms_and_gated_products(graph):
    names = smoothable(graph)
    assert [name for name in names if "layers.1." in name] == [
        f"model.model.layers.1.{layer}.weight"
        for layer in ("attn.Wqkv.1_2_3", "mlp.Wi.1_2", "mlp.Wo")
    ]
    assert not [name for name in names if "attn.Wo" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"precision": "bf16"}, 0.999),
        ({"precision": "int8"}, 0.99),
        ({"precision": "int8", "ranges": "minmax"}, 0.98),
        ({"precision": "int8", "smooth": 0.5}, 0.99),
        ({"precision": "int8", "ranges": "minmax", "smooth": 0.5}, 0.98),
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
    assert cosine_with_torch(compiled(tmp_path, **options), model) > cosine


@pytest.mark.slow
def test_all_8192_tokens_equal_torch(tmp_path):
    more = {"max_position_embeddings": 8192, "local_attention": 128, "num_hidden_layers": 3}
    model = saved(tmp_path / "model", **more)
    with quiet():
        model.set_attn_implementation("sdpa")
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model, ((1, 8192), (2, 700)), tolerance=1e-4)
