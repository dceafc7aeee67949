"""Small decoders of odd sizes, at every head and precision, against transformers, however their
texts are padded.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from helpers import family_models, odd_models, sentence_models
from helpers.odd_models import (
    LIMIT,
    ONCE,
    SHAPES,
    answers,
    compiled,
    cosine_with_torch,
    left_to_tvm,
    planned,
    shapes_of,
)

import bertile
from bertile import loader
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.run.cuda import emulator
from bertile.targets.rows import resolve

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ODD = {
    "vocab_size": 100,
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.1,
    **SPECIAL,
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10}
GPT2 = {"n_embd": 60, "n_head": 3, "n_inner": 44, "n_layer": 2, "n_positions": LIMIT}
# transformers' class and configuration; what kernels of attention and which products there are
CASES = {
    "Qwen3": ("Qwen3", {}),
    "Qwen3 in windows": ("Qwen3", {**TWO_KINDS, "use_sliding_window": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Gemma3": ("Gemma3Text", {**TWO_KINDS, "query_pre_attn_scalar": 20}),
    "Gemma3 of both sides": (
        "Gemma3Text",
        {**TWO_KINDS, "use_bidirectional_attention": True, "sliding_window": 20},
    ),
    "Gemma2": ("Gemma2", {**TWO_KINDS, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    "GPT2": ("GPT2", GPT2),
    "EuroBert": ("EuroBert", {}),
}
LEFT = {*ONCE, "add", "take"}
# without a key that it sees a token's vector means nothing
batch = partial(odd_models.batch, first_is_real=True)
assert_equals_torch = partial(odd_models.assert_equals_torch, first_is_real=True)


def saved(directory, case, head="Model", **more):
    """A model of ODD's sizes, as `odd_models.saved`."""
    name, changes = CASES[case]
    sizes = {**ODD, **changes, **more}
    if name == "GPT2":
        sizes = {"vocab_size": 100, "initializer_range": 0.1, **SPECIAL, **changes, **more}
    prefix = "Gemma3" if (name, head) == ("Gemma3Text", "ForCausalLM") else name
    return odd_models.saved(directory, f"{prefix}{head}", f"{name}Config", sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_odd_sizes_equal_torch_however_texts_are_padded(tmp_path, case):
    model = saved(tmp_path / "model", case)
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model)
    # masks and the angles of places are made once a request; of a layer nothing is left but the
    # residual of what Gemma's norms behind a sublayer give
    assert left_to_tvm(bundle) <= LEFT
    if case != "GPT2":
        assert {shape["kv_heads"] for shape in shapes_of(bundle, "attention")} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForCausalLM"])
def test_heads_equal_torch(tmp_path, case, head):
    lm = {"GPT2": "LMHeadModel", "EuroBert": "ForMaskedLM"}.get(case, head)
    model = saved(tmp_path / "model", case, lm if head == "ForCausalLM" else head, num_labels=3)
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model, tolerance=5e-5)


@pytest.mark.slow
def test_embedding_without_modules_is_the_last_tokens_vector(tmp_path):
    model = saved(tmp_path / "model", "Qwen3")
    bundle = compiled(tmp_path, head="embedding")
    for padding in ("right", "left"):
        arrays = batch(5, 50, padding)
        hidden = torch.from_numpy(answers(model, arrays)["last_hidden_state"])
        mask = arrays["attention_mask"]
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        want = torch.nn.functional.normalize(hidden[torch.arange(5), torch.from_numpy(last)], dim=1)
        got = bundle(**arrays)["sentence_embedding"]
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Qwen3", "Gemma3"])
def test_600_tokens_equal_torch(tmp_path, case):
    model = saved(tmp_path / "model", case, max_position_embeddings=1000)
    assert_equals_torch(compiled(tmp_path), model, ((1, 1000), (2, 600)), tolerance=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Qwen3", "Llama with biases", "Gemma3"])
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"precision": "bf16"}, 0.999),
        ({"precision": "int8"}, 0.99),
        ({"precision": "int8", "ranges": "minmax"}, 0.95),
        ({"precision": "int8", "smooth": 0.5}, 0.99),
        ({"precision": "int4"}, 0.8),
        ({"sparse": "always"}, 0.9999999),
    ],
    ids=str,
)
def test_other_precisions_are_near_torch(tmp_path, case, options, cosine):
    model = saved(tmp_path / "model", case, intermediate_size=64, hidden_size=96)
    if {"ranges", "smooth"} & set(options):
        np.savez(tmp_path / "some.npz", **batch(32, 60, "right"))
        options = {**options, "calibrate": str(tmp_path / "some.npz")}
    bundle = compiled(tmp_path, **options)
    assert cosine_with_torch(bundle, model) > cosine


TINY = "qwen3-tiny", family_models.HEAD_OF["qwen3"]  # which other tests export too


@pytest.fixture(scope="module")
def graph(stages):
    return optimize(import_onnx(family_models.exported(*TINY, stages)))


def test_a_layer_is_seven_operators(graph):
    tasks = planned(graph, resolve("x86-avx512", threads=1), "fp32")
    assert {t.operation for t in tasks} <= {
        *("dense", "attention", "rotary", "layer_norm", "embedding", "key_mask"),
        *("tokens_in", "tokens_out"),
    }
    (attention,) = (t.shape for t in tasks if t.operation == "attention")
    expected = {"heads": 4, "kv_heads": 2, "head_size": 32, "keys": "causal"}
    assert expected.items() <= attention.items()
    (rotary,) = (t.shape for t in tasks if t.operation == "rotary")
    assert rotary == {"channels": 256, "heads": 6, "head_size": 32, "epsilon": 1e-6}
    products = [t.shape for t in tasks if t.operation == "dense"]
    assert [p["outputs"] for p in products][:1] == [256]
    assert {p.get("gated", False) for p in products} == {True, False}


def test_attention_in_bfloat16_gets_its_pairs_of_the_norms(graph):
    tasks = planned(graph, resolve("x86-avx512-bf16", threads=1), "bf16")
    (rotary,) = (t.shape for t in tasks if t.operation == "rotary")
    assert (rotary["writes"], rotary["values_from"]) == ("to_bf16", 192)
    (attention,) = (t.shape for t in tasks if t.operation == "attention")
    assert attention["precision"] == "bf16"


@pytest.mark.slow  # quick: each kernel by itself, in schedules/cuda
def test_a_gpu_answers_as_onnx_runtime(stages, tmp_path):
    """With all that a decoder asks of kernels."""
    if lacks := emulator.missing():
        pytest.skip(lacks)
    directory, head = family_models.directory(*TINY, stages), TINY[1]
    config = Config(target="cuda-sm90", head=head, cache_dir=stages)
    bertile.compile(str(directory), tmp_path / "bundle", config)
    manifest = loader.read_manifest(tmp_path / "bundle")
    assert manifest["check"]["max_abs_difference"] <= 2e-5
    shapes = {kernel["operation"]: kernel["shape"] for kernel in manifest["kernels"]}
    assert {"keys": "causal", "kv_heads": 2}.items() <= shapes["attention"].items()
    assert shapes["rotary"]["epsilon"] and shapes["layer_norm"]["rms"]
    assert any(kernel["shape"].get("gated") for kernel in manifest["kernels"])


@pytest.mark.slow
def test_a_directory_of_sentence_transformers_that_takes_the_last_token(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    base = sentence_models.transformer(tmp_path / "base", model_type="qwen3")
    modules = [Transformer(str(base)), Pooling(128, "lasttoken"), Normalize()]
    original = SentenceTransformer(modules=modules, device="cpu")
    sentence_models.saved(tmp_path / "model", original)
    compiled(tmp_path)
    with bertile.open(tmp_path / "bundle", threads=2) as model:
        got = model.encode(list(sentence_models.TEXTS))
    np.testing.assert_allclose(got, original.encode(list(sentence_models.TEXTS)), atol=2e-5)


FILES = {
    "Qwen3, torchscript": ("Qwen3", "eager", False),
    "Qwen3, dynamo": ("Qwen3", "sdpa", True),
    "Gemma3, torchscript": ("Gemma3", "sdpa", False),
    "Gemma3, dynamo": ("Gemma3", "eager", True),
    "GPT2, dynamo": ("GPT2", "sdpa", True),
    "GPT2, torchscript": ("GPT2", "sdpa", False),
    "Llama, torchscript": ("Llama with biases", "eager", False),
    "Llama, dynamo": ("Llama with biases", "sdpa", True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "attention", "dynamo"), FILES.values(), ids=FILES)
def test_onnx_files_are_fused_as_checkpoints_are(tmp_path, case, attention, dynamo):
    model = saved(tmp_path / "checkpoint", case)
    with quiet():
        model.set_attn_implementation(attention)

    odd_models.write_onnx(model, tmp_path / "model.onnx", dynamo, use_cache=False)
    bundle = compiled(tmp_path, "model.onnx")
    assert_equals_torch(bundle, model, SHAPES[:3], paddings=("right",))
    assert left_to_tvm(bundle) <= LEFT
