"""DeBERTa of odd sizes in every precision against torch, by every kind of distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers import family_models

import bertile
from bertile import backends
from bertile.backends.cpu import precision_plan
from bertile.base.errors import ModelError
from bertile.base.quiet import quiet
from bertile.config import Config
from bertile.export import exporter
from bertile.families.family import WITHOUT_TABLE
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
PADDINGS = ("right", "left", "holes")
SHAPES = ((1, 1), (3, 37), (2, 16), (1, LIMIT))


def saved(directory, kind=V2, head="", **more):
    """A model with random weights, biases too, as save_pretrained writes it; and itself."""
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{kind}{head or 'Model'}")
    with quiet():
        config = getattr(transformers, f"{kind}Config")(**{**ODD, **more})
        model = model_class(config).eval()
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
    mask = np.arange(length) < lengths[:, None]
    if padding == "left":
        mask = mask[:, ::-1]
    elif padding == "holes":
        mask = rng.random((rows, length)) < 0.5
        mask[:, rng.integers(0, length)] = True
    ids = np.where(mask, rng.integers(2, 100, (rows, length)), 0)
    return {"input_ids": ids, "attention_mask": mask.astype("int64")}


def assert_equals_torch(bundle, model, shapes=SHAPES, tolerance=2e-5, paddings=PADDINGS):
    for rows, length in shapes:
        for padding in paddings:
            arrays = batch(rows, length, padding)
            want = family_models.torch_outputs(model, "", arrays)
            got = bundle(**arrays)
            for name, value in got.items():
                difference = largest_difference(value, want[name], arrays["attention_mask"])
                limit = tolerance * max(1, np.abs(want[name]).max())
                assert difference <= limit, (name, rows, length, padding)


def compiled(tmp_path, **options):
    config = Config(cache_dir=str(tmp_path / "cache"), **options)
    bertile.compile(str(tmp_path / "model"), tmp_path / "bundle", config)
    return bertile.load(tmp_path / "bundle")


CASES = [(kind, name) for kind in (V2, V1) for name in KINDS if kind == V2 or name not in OF_V2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_odd_sizes_equal_torch_by_every_kind_of_distance(tmp_path, kind, name):
    model = saved(tmp_path / "model", kind, **KINDS[name])
    bundle = compiled(tmp_path)
    unlimited = not getattr(model.config, "position_biased_input", True)
    shapes = (*SHAPES, (1, 3 * LIMIT)) if unlimited else SHAPES
    assert_equals_torch(bundle, model, shapes)
    (attention,) = (k["shape"] for k in bundle.manifest["kernels"] if k["operation"] == "attention")
    assert attention.get("relative", "none") == {
        "keys": "keys",
        "queries": "queries",
        **dict.fromkeys(("none", "no distance"), "none"),
    }.get(name, "both")
    # masks are made once a request; nothing of a layer is left
    left = {entry.partition(" ")[0] for entry in bundle.manifest["fallthrough"]}
    masks = {"astype", "expand_dims", "subtract", "multiply", "strided_slice"}
    assert left <= masks | ({"take", "add"} if name == "narrow words" else set())


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
    # a classifier reads the first token, of which nothing is computed where it is padding
    by_first = head == "ForSequenceClassification"
    paddings = [padding for padding in PADDINGS if not (by_first and padding == "left")]
    assert_equals_torch(compiled(tmp_path), model, paddings=paddings)


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
    arrays = batch(3, 90, "right")
    real = arrays["attention_mask"] != 0
    got = bundle(**arrays)["last_hidden_state"][real]
    want = family_models.torch_outputs(model, "", arrays)["last_hidden_state"][real]
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > cosine


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


def planned(graph, row, precision):
    graph = precision_plan.plan_layers(graph, precision, row, None, "off")
    return list(lowering.tasks(backends.of(row).forms(graph)))


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
