"""Encoders that only prepare their model, against transformers however texts are padded."""

from __future__ import annotations

import pytest
from helpers import odd_models
from helpers.odd_models import (
    LIMIT,
    ONCE,
    SHAPES,
    assert_equals_torch,
    compiled,
    left_to_tvm,
    shapes_of,
)

from bertile.base.errors import ModelError
from bertile.config import Config
from bertile.export import cached
from bertile.families.table import of_type

ODD = {
    "vocab_size": 100,
    "hidden_size": 60,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
}
AFTER_PADDING = {"max_position_embeddings": LIMIT + 1, "type_vocab_size": 1}
ROTARY = {"position_embedding_type": "rotary", "mask_token_id": 50}
LANGUAGES = {"languages": ["aa", "bb", "cc"], "default_language": "bb", **AFTER_PADDING}
BOXES = 64
# transformers' prefix and what is said beside ODD, and what is left to TVM beside masks
PRE_NORM = {"add", "take"}
PLACES = {"add", "cumsum", "equal", "logical_not"}
REAL = {"equal"}
DROPOUT = {"divide", "sum", "logical_not"}
CASES = {
    "ESM-2": ("Esm", {**ROTARY, "token_dropout": True}, PRE_NORM | REAL | DROPOUT),
    "ESM-2 without token dropout": ("Esm", ROTARY, PRE_NORM | REAL),
    "ESM-1b": (
        "Esm",
        {
            **{"position_embedding_type": "absolute", "emb_layer_norm_before": True},
            **{"token_dropout": True, "mask_token_id": 50, "max_position_embeddings": LIMIT + 1},
        },
        PRE_NORM | DROPOUT | PLACES,
    ),
    "XLM-RoBERTa-XL": ("XLMRobertaXL", AFTER_PADDING, PRE_NORM | PLACES),
    "X-MOD": ("Xmod", LANGUAGES, PLACES),
    "X-MOD, norms before and of its own": (
        "Xmod",
        {**LANGUAGES, "pre_norm": True, "adapter_layer_norm": True, "ln_before_adapter": False},
        PRE_NORM | PLACES,
    ),
    "RoFormer": ("RoFormer", {"embedding_size": 60}, {"squeeze"}),
    "RoFormer, values turned too": (
        "RoFormer",
        {"embedding_size": 28, "rotary_value": True},
        {"squeeze", "concat"},
    ),
    "LayoutLM": ("LayoutLM", {"max_2d_position_embeddings": BOXES}, {"greater", "where"}),
}


def saved(directory, case, head="Model", **more):
    """A model of ODD's sizes, as `odd_models.saved`."""
    name, changes, _ = CASES[case]
    sizes = {**ODD, **changes, **more}
    return odd_models.saved(directory, f"{name}{head}", f"{name}Config", sizes)


def boxes_of(case):
    return CASES[case][1].get("max_2d_position_embeddings", 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_odd_sizes_equal_torch_however_texts_are_padded(tmp_path, case):
    model = saved(tmp_path / "model", case)
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model, boxes=boxes_of(case))
    assert left_to_tvm(bundle) <= ONCE | CASES[case][2]
    assert len(shapes_of(bundle, "attention")) == 1


HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", ["ESM-2", "X-MOD", "RoFormer", "LayoutLM"])
def test_heads_equal_torch(tmp_path, case, head):
    model = saved(tmp_path / "model", case, head, num_labels=3)
    # a classifier reads the first token, of which nothing is computed where it is padding
    paddings = ("right",) if head == HEADS[0] else odd_models.PADDINGS
    bundle = compiled(tmp_path)
    assert_equals_torch(bundle, model, tolerance=5e-5, paddings=paddings, boxes=boxes_of(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ESM-2", "RoFormer, values turned too", "X-MOD"])
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"precision": "bf16"}, 0.999),
        ({"precision": "int8"}, 0.99),
        ({"precision": "int4"}, 0.8),
        ({"sparse": "always"}, 0.9999999),
    ],
    ids=str,
)
def test_other_precisions_are_near_torch(tmp_path, case, options, cosine):
    sizes = {"hidden_size": 96, "intermediate_size": 64, "initializer_range": 0.1}
    model = saved(tmp_path / "model", case, **sizes)
    assert odd_models.cosine_with_torch(compiled(tmp_path, **options), model) > cosine


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("case", ["ESM-2", "XLM-RoBERTa-XL", "RoFormer", "LayoutLM"])
def test_onnx_files_equal_torch(tmp_path, case, dynamo):
    model = saved(tmp_path / "checkpoint", case)
    odd_models.write_onnx(model, tmp_path / "model.onnx", dynamo, boxes_of(case))
    bundle = compiled(tmp_path, "model.onnx")
    assert_equals_torch(bundle, model, SHAPES[:3], paddings=("right",), boxes=boxes_of(case))
    assert shapes_of(bundle, "attention")


@pytest.mark.slow
def test_8192_tokens_of_xlm_roberta_equal_torch(tmp_path):
    sizes = {**ODD, **AFTER_PADDING, "max_position_embeddings": 8194, "pad_token_id": 1}
    model = odd_models.saved(tmp_path / "model", "XLMRobertaModel", "XLMRobertaConfig", sizes)
    bundle = compiled(tmp_path)
    assert bundle.max_length == 8192
    model.set_attn_implementation("sdpa")
    assert_equals_torch(bundle, model, ((1, 8192), (2, 700)), tolerance=1e-4)


@pytest.mark.slow
def test_boxes_that_are_left_out_are_zeros_as_in_transformers(tmp_path):
    model = saved(tmp_path / "model", "LayoutLM")
    assert_equals_torch(compiled(tmp_path), model)


def test_model_of_no_language_is_refused_with_those_that_it_has(tmp_path):
    saved(tmp_path / "model", "X-MOD", default_language=None)
    with pytest.raises(ModelError, match=r"default_language is None; write .*: aa, bb, cc"):
        cached.export_cached(str(tmp_path / "model"), Config(cache_dir=str(tmp_path / "cache")))


def test_positions_of_esm_count_from_zero_where_they_are_angles(tmp_path):
    family = of_type("esm")
    rotary, absolute = (saved(tmp_path, case) for case in ("ESM-2", "ESM-1b"))
    assert (family.padding_id(rotary), family.padding_id(absolute)) == (None, 0)
    assert (family.max_length(rotary), family.max_length(absolute)) == (LIMIT, LIMIT)
