"""Masks that differ by query are recognised where they are causal or a window, are a tensor where
they are not, and are never taken for what they only look like.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import foreign_forms as forms
from helpers.attention_variants import CLOSING, VARIANTS
from onnx import helper
from onnx.numpy_helper import from_array

import bertile
from bertile.base.errors import NumericMismatchError
from bertile.config import Config
from bertile.graph import ops
from bertile.graph.importer import import_onnx
from bertile.graph.order import optimize
from bertile.graph.rewriting.dataflow import Dataflow
from bertile.onnx import normalizer
from bertile.onnx.samples import largest_difference, sample, session

LIMIT = 150  # positions of the models here; larger than every window
SHAPES = ((1, 1), (3, 37), (2, 16), (1, LIMIT))
TOLERANCE = 2e-5  # one attention in float32
OTHERS = pytest.mark.parametrize("variant", CLOSING)
LOWEST = torch.finfo(torch.float32).min


def pairs(mask):
    """Places of queries (S, 1) and of keys (1, S)."""
    places = torch.arange(mask.shape[1])
    return places[:, None], places[None, :]


def chosen(sees):
    """scores where a query sees a real key, a low number elsewhere."""

    def masked(scores, mask):
        seen = sees(*pairs(mask))[None, None] & (mask[:, None, None, :] > 0)
        return torch.where(seen, scores, torch.tensor(-1e9))

    return masked


def added(sees):
    """What closes a key is added, once for its place and once for its padding."""

    def masked(scores, mask):
        unseen = 1.0 - sees(*pairs(mask)).float()
        padded = 1.0 - mask[:, None, None, :].float()
        return scores + unseen * -60000.0 + padded * LOWEST

    return masked


def filled(sees):
    """Without padding: every key of a batch is real."""
    return lambda scores, mask: scores.masked_fill(~sees(*pairs(mask)), float("-inf"))


def unmasked_padding(sees):
    """As ``chosen``, but a query that is padding sees all, as transformers does for its kernels."""

    def masked(scores, mask):
        seen = sees(*pairs(mask))[None, None] & (mask[:, None, None, :] > 0)
        seen = seen | (mask[:, None, :, None] == 0)
        return scores + torch.where(seen, torch.tensor(0.0), torch.tensor(LOWEST))

    return masked


SPELLINGS = {spelling.__name__: spelling for spelling in (chosen, added, filled, unmasked_padding)}


def write(path: Path, masked, dynamic: bool = True, limit: int | None = LIMIT) -> Path:
    """A model of one attention whose mask is applied by ``masked``(scores, attention_mask)."""
    names, axes = ["input_ids", "attention_mask"], {0: "b", 1: "s"}
    options = {"dynamo": False, "opset_version": 14, "input_names": names}
    options["output_names"] = ["hidden"]
    if dynamic:
        options["dynamic_axes"] = {name: axes for name in (*names, "hidden")}
    if limit:
        text = json.dumps({"max_position_embeddings": limit})
        (path.parent / "config.json").write_text(text)
    arrays = (torch.ones(2, 24, dtype=torch.int64),) * 2
    forms.run_quietly(forms.OneAttention(masked), arrays, path, options)
    return path


def normalized(path: Path, shapes=SHAPES):
    """The canonical model, after a check that it computes what the original does."""
    exported = normalizer.normalize(path, path.parent / "out", Config())
    before, after = session(path), session(exported.onnx_path)
    read = {argument.name for argument in before.get_inputs()}
    for seed, shape in enumerate(shapes):
        arrays = sample(exported.inputs, *shape, padding_id=1, seed=seed)
        arrays.setdefault("attention_mask", np.ones_like(arrays["input_ids"]))
        (want,) = before.run(None, {name: arrays[name] for name in read})
        (got,) = after.run(
            None, {argument.name: arrays[argument.name] for argument in after.get_inputs()}
        )
        assert largest_difference(got, want, arrays["attention_mask"]) < TOLERANCE
    return exported


def seen_keys(exported) -> dict:
    """The fields of the attention's spec that say which keys are seen, and the kind of its bias."""
    flow = Dataflow(optimize(import_onnx(exported)).main)
    (call,) = (b.value for b in flow.bindings if ops.is_call(b.value, "bertile.attention"))
    spec = ops.attention_spec(call)
    return {"keys": spec.keys, "window": spec.window, "bias": spec.bias}


@OTHERS
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mask_by_query_is_recognised_in_any_spelling(tmp_path, variant, spelling):
    path = write(tmp_path / "m.onnx", SPELLINGS[spelling](VARIANTS[variant].sees))
    exported = normalized(path)
    operators = {node.op_type for node in onnx.load(exported.onnx_path).graph.node}
    assert not operators & {"Where", "Range", "Expand", "Trilu"}
    assert not any("is kept as it is" in note for note in exported.notes)
    expected = {"window": 0, "bias": "none", **VARIANTS[variant].fields}
    assert seen_keys(exported) == expected


# Every variant and either spelling is quick once: recognised, all give the same kernels.
COMPILED = [
    pytest.param(variant, spelling, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
    for i, variant in enumerate(CLOSING)
    for j, spelling in enumerate(("chosen", "filled"))
]


@pytest.mark.parametrize(("variant", "spelling"), COMPILED)
def test_a_model_with_a_mask_by_query_equals_onnxruntime(tmp_path, variant, spelling):
    path = write(tmp_path / "m.onnx", SPELLINGS[spelling](VARIANTS[variant].sees))
    bertile.compile(
        str(path), tmp_path / "bundle", Config(cache_dir=str(tmp_path / "cache"), runtime="none")
    )
    model, original = bertile.load(tmp_path / "bundle"), session(path)
    (kernel,) = (k for k in model.manifest["kernels"] if k["operation"] == "attention")
    assert VARIANTS[variant].fields.items() <= kernel["shape"].items()
    rng = np.random.default_rng(0)
    for batch, length in (*SHAPES, (5, 70)):
        ids = rng.integers(0, 50, (batch, length))
        mask = np.arange(length) < rng.integers(1, length + 1, (batch, 1))  # unequal lengths
        mask[0] = True
        arrays = {"input_ids": ids, "attention_mask": mask.astype("int64")}
        read = {argument.name for argument in original.get_inputs()}
        (want,) = original.run(None, {name: arrays[name] for name in read})
        got = model(**{name: arrays[name] for name in model.inputs})["hidden"]
        assert largest_difference(got, want, mask) < TOLERANCE, (batch, length)


@OTHERS
def test_static_lengths_are_recognised(tmp_path, variant):
    path = write(tmp_path / "m.onnx", chosen(VARIANTS[variant].sees), dynamic=False)
    exported = normalized(path, ((2, 24),))
    assert exported.length == 24 and seen_keys(exported)["keys"] == VARIANTS[variant].fields["keys"]


def chosen_of_bools(sees):
    """As ``chosen``, of a tensor (batch, length) that says which keys are real."""

    def masked(scores, mask):
        real = mask.bool() & (mask < 2)
        seen = sees(*pairs(mask))[None, None] & real[:, None, None, :]
        return torch.where(seen, scores, torch.tensor(-1e9))

    return masked


@pytest.mark.parametrize("limit", [LIMIT, None])
@pytest.mark.parametrize("spelling", [chosen, chosen_of_bools])
def test_a_window_that_shows_in_long_sequences_alone_is_recognised(tmp_path, limit, spelling):
    path = write(tmp_path / "m.onnx", spelling(lambda i, j: abs(i - j) <= 40), limit=limit)
    assert seen_keys(normalized(path)) == {"keys": "window", "window": 40, "bias": "none"}


def test_a_window_that_no_sequence_leaves_is_the_mask_of_keys(tmp_path):
    path = write(tmp_path / "m.onnx", chosen(lambda i, j: abs(i - j) < LIMIT))
    assert seen_keys(normalized(path)) == {"keys": "all", "window": 0, "bias": "none"}


def one_key_off(i, j):
    return (j <= i) | ((i == 3) & (j == 7))


def window_in_short_sequences(i, j):
    return (abs(i - j) <= 5) | (j.max() > 100)


def window_in_long_sequences(i, j):
    return (abs(i - j) <= 5) | (j.max() < 100)


def longer_before(i, j):
    return (i - j <= 4) & (j - i <= 2)


def dilated(i, j):
    return (abs(i - j) <= 6) & ((i - j) % 2 == 0)


def and_one_more(i, j):
    return j <= i + 1


def all_of_the_first(i, j):  # Longformer's global token
    return (abs(i - j) <= 5) | (j == 0) | (i == 0)


LOOK_ALIKES = [
    one_key_off,
    longer_before,
    dilated,
    and_one_more,
    all_of_the_first,
]


@pytest.mark.parametrize("sees", LOOK_ALIKES)
def test_a_look_alike_is_a_tensor(tmp_path, sees):
    exported = normalized(write(tmp_path / "m.onnx", chosen(sees)))
    assert not any("is kept as it is" in note for note in exported.notes)
    assert seen_keys(exported) == {"keys": "all", "window": 0, "bias": "tensor"}


@pytest.mark.parametrize("sees", [one_key_off, pytest.param(longer_before, marks=pytest.mark.slow)])
def test_a_model_with_a_look_alike_equals_onnxruntime(tmp_path, sees):
    path = write(tmp_path / "m.onnx", chosen(sees))
    bertile.compile(
        str(path), tmp_path / "bundle", Config(cache_dir=str(tmp_path / "cache"), runtime="none")
    )
    model, original = bertile.load(tmp_path / "bundle"), session(path)
    rng = np.random.default_rng(0)
    for batch, length in SHAPES:
        ids, mask = rng.integers(0, 50, (batch, length)), np.ones((batch, length), "int64")
        mask[-1, (length + 1) // 2 :] = 0
        (want,) = original.run(None, {"input_ids": ids, "attention_mask": mask})
        got = model(input_ids=ids, attention_mask=mask)["hidden"]
        assert largest_difference(got, want, mask) < TOLERANCE


@pytest.mark.parametrize("sees", [window_in_short_sequences, window_in_long_sequences])
def test_a_window_of_some_lengths_alone_is_no_window(tmp_path, sees):
    """What decides by the length is folded as short sequences have it, which the check refuses."""
    with pytest.raises(NumericMismatchError, match="differs from the original"):
        normalized(write(tmp_path / "m.onnx", chosen(sees)))


def over_the_batch(scores, mask):
    i, j = pairs(mask)
    rows = torch.arange(mask.shape[0])[:, None, None, None]
    return scores.masked_fill(j[None, None] > i[None, None] + rows, -1e9)


@pytest.mark.parametrize("masked", [over_the_batch, forms.prefixed])
def test_a_mask_that_rows_decide_is_kept_as_it_is(tmp_path, masked):
    exported = normalized(write(tmp_path / "m.onnx", masked))
    assert any("is kept as it is" in note for note in exported.notes)


def test_a_finite_slope_is_no_mask(tmp_path):
    def sloped(scores, mask):  # ALiBi's: causal in shape, by its values a bias
        i, j = pairs(mask)
        return (
            scores
            + torch.where(j > i, -3.0, 0.0)[None, None]
            * torch.tensor([0.5, 2.0])[None, :, None, None]
        )

    exported = normalized(write(tmp_path / "m.onnx", sloped))
    assert seen_keys(exported) == {"keys": "all", "window": 0, "bias": "tensor"}


def test_a_causal_attention_with_slopes_is_a_table(tmp_path):
    def sloped(scores, mask):
        i, j = pairs(mask)
        slopes = torch.tensor([0.5, 2.0])[None, :, None, None]
        bias = torch.where(j > i, torch.tensor(-1e9), (j - i) * slopes)
        return scores + bias + (1.0 - mask[:, None, None, :].float()) * LOWEST

    exported = normalized(write(tmp_path / "m.onnx", sloped))
    assert seen_keys(exported) == {"keys": "all", "window": 0, "bias": "tensor"}


def test_attention_of_opset_23_may_be_causal(tmp_path):
    rng = np.random.default_rng(0)
    table = from_array(rng.standard_normal((50, 16)).astype("float32"), "table")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node("Reshape", ["hidden", "split"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["q"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["q", "q", "q"], ["context"], is_causal=1, scale=0.25),
        helper.make_node("Transpose", ["context"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "joined"], ["hidden_states"]),
    ]
    sizes = [
        from_array(np.array(s), n) for n, s in (("split", [0, 0, 2, 8]), ("joined", [0, 0, 16]))
    ]
    of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "causal",
        [of("input_ids", onnx.TensorProto.INT64, ["b", "s"])],
        [of("hidden_states", onnx.TensorProto.FLOAT, ["b", "s", 16])],
        [table, *sizes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    exported = normalized(tmp_path / "m.onnx")
    assert seen_keys(exported)["keys"] == "causal"
