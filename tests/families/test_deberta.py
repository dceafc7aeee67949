"""DeBERTa of odd sizes in every precision against torch, by every kind of distance."""

from __future__ import annotations

import pytest
from helpers import family_models, odd_models
from helpers.odd_models import (
    LIMIT,
    ONCE,
    PADDINGS,
    SHAPES,
    assert_equals_torch,
    compiled,
    cosine_with_torch,
    left_to_tvm,
    planned,
    shapes_of,
)

from bertile.base.errors import ModelError
from bertile.config import Config
from bertile.export import exporter
from bertile.families.family import WITHOUT_TABLE
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.targets.rows import resolve

ODD = {
    "vocab_size": 100,
    "hidden_size": 60,
    "num_attention_heads": 3,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "max_position_embeddings": LIMIT,
    "initializer_range": 0.3,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
}
BUCKETS = {"position_buckets": 12, "max_relative_positions": 60}
# What a layer's attention looks at beside its tokens, and by what of a config.
KINDS = {
    "both": {},
    "keys": {"pos_att_type": ["c2p"]},
    "queries": {"pos_att_type": ["p2c"]},
    "none": {"pos_att_type": []},
    "no distance": {"relative_attention": False, "pos_att_type": None},
    "shared": {"share_att_key": True, "norm_rel_ebd": "layer_norm", **BUCKETS},
    "as v3": {
        **{"share_att_key": True, "norm_rel_ebd": "layer_norm", **BUCKETS},
        **{"position_biased_input": False, "type_vocab_size": 0},
    },
    "narrow words": {"embedding_size": 24, **BUCKETS},
}
OF_V2 = {"shared", "as v3", "narrow words"}
V2, V1 = ("DebertaV2", "Deberta")


def saved(directory, kind=V2, head="Model", **more):
    """A model of ODD's sizes, as `odd_models.saved`."""
    return odd_models.saved(directory, f"{kind}{head}", f"{kind}Config", {**ODD, **more})


CASES = [(kind, name) for kind in (V2, V1) for name in KINDS if kind == V2 or name not in OF_V2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_odd_sizes_equal_torch_by_every_kind_of_distance(tmp_path, kind, name):
    model = saved(tmp_path / "model", kind, **KINDS[name])
    bundle = compiled(tmp_path)
    unlimited = not getattr(model.config, "position_biased_input", True)
    shapes = (*SHAPES, (1, 3 * LIMIT)) if unlimited else SHAPES
    assert_equals_torch(bundle, model, shapes)
    (attention,) = shapes_of(bundle, "attention")
    assert attention.get("relative", "none") == {
        "keys": "keys",
        "queries": "queries",
        **dict.fromkeys(("none", "no distance"), "none"),
    }.get(name, "both")
    # masks are made once a request; nothing of a layer is left
    assert left_to_tvm(bundle) <= ONCE | ({"take", "add"} if name == "narrow words" else set())


HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", [V2, V1])
def test_heads_equal_torch(tmp_path, kind, head):
    model = saved(tmp_path / "model", kind, head)
    # a classifier reads the first token, of which nothing is computed where it is masked
    by_first = head == "ForSequenceClassification"
    paddings = [padding for padding in PADDINGS if not (by_first and padding == "left")]
    assert_equals_torch(compiled(tmp_path), model, paddings=paddings, first_is_real=by_first)


@pytest.mark.slow
def test_mask_filling_as_the_authors_do_equals_torch(tmp_path):
    model = saved(tmp_path / "model", V2, "ForMaskedLM", legacy=False)
    assert_equals_torch(compiled(tmp_path, head="masked-lm"), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        ({"precision": "bf16"}, 0.999),
        ({"precision": "fp16"}, 0.999),
        ({"precision": "int8"}, 0.99),
        ({"precision": "int4"}, 0.8),
        ({"sparse": "always"}, 0.9999999),
    ],
    ids=str,
)
def test_other_precisions_are_near_torch(tmp_path, options, cosine):
    sizes = {"hidden_size": 96, "intermediate_size": 64, "initializer_range": 0.1}
    model = saved(tmp_path / "model", V2, **sizes, **KINDS["as v3"])
    bundle = compiled(tmp_path, **options)
    assert cosine_with_torch(bundle, model) > cosine


@pytest.mark.slow
def test_thousands_of_tokens_equal_torch(tmp_path):
    more = {"position_buckets": 256, "max_relative_positions": -1, "max_position_embeddings": 512}
    model = saved(tmp_path / "model", V2, **{**KINDS["as v3"], **more})
    bundle = compiled(tmp_path)
    assert bundle.max_length == WITHOUT_TABLE
    assert_equals_torch(bundle, model, ((1, 2500), (2, 700)), tolerance=1e-4)


TINY = "deberta-v2-tiny", family_models.HEAD_OF["deberta-v2"]  # which other tests export too


@pytest.fixture(scope="module")
def graph(stages):
    return optimize(import_onnx(family_models.exported(*TINY, stages)))


def test_tables_are_cut_behind_the_last_bucket(graph):
    tasks = planned(graph, resolve("x86-avx512", threads=1), "fp32")
    (attention,) = (task.shape for task in tasks if task.operation == "attention")
    # 16 buckets on each side, of which the last begins at 99 tokens
    assert (attention["relative"], attention["last"]) == ("both", 100)
    assert attention["scale"] == pytest.approx((3 * 64) ** -0.5)


def test_attention_is_in_halves_where_layers_are_in_halves_or_bytes(graph):
    row = resolve("x86-avx512-bf16", threads=1)
    for precision in ("bf16", "int8"):
        tasks = planned(graph, row, precision)
        (attention,) = (task.shape for task in tasks if task.operation == "attention")
        assert attention["precision"] == "bf16"


REFUSED = {
    "conv_kernel_size": (V2, {"conv_kernel_size": 3}),
    "talking_head": (V1, {"talking_head": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_some_models_have_is_refused_by_name(tmp_path, name):
    kind, fields = REFUSED[name]
    saved(tmp_path / "model", kind, **fields)
    with pytest.raises(ModelError, match=name):
        exporter.export(str(tmp_path / "model"), tmp_path / "export", Config())
