"""What an attention is said to compute: refusals by field, keys of logs, the reference by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.attention_variants import VARIANTS

from bertile import tuning_logs
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.task import Task

PLAIN = AttentionSpec(heads=4, kv_heads=4, head_size=8, scale=0.5)
OF_KERNELS = {"precision", "writes"}  # what a task says beside its spec
ALL = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("heads", {"heads": 0}),
        ("kv_heads", {"kv_heads": 3}),
        ("kv_heads", {"kv_heads": 0}),
        ("head_size", {"head_size": -1}),
        ("scale", {"scale": float("nan")}),
        ("keys", {"keys": "some"}),
        ("window", {"keys": "window"}),
        ("window", {"window": 4}),
        ("window", {"keys": "causal", "window": 4}),
        ("window", {"keys": "window", "window": -1}),
        ("bias", {"bias": "yes"}),
        ("softcap", {"softcap": -1.0}),
        ("relative", {"relative": "values", "last": 3}),
        ("last", {"relative": "keys"}),
        ("last", {"last": 3}),
    ],
    ids=str,
)
def test_a_combination_that_means_nothing_is_refused_by_its_field(field, wrong):
    with pytest.raises(ValueError, match=rf"^{field} is "):
        dataclasses.replace(PLAIN, **wrong)


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.heads = 2


def test_a_scale_is_equal_however_an_exporter_rounds_it():
    rounded = AttentionSpec(12, 12, 32, float(np.float32(32**-0.5)))
    assert rounded == AttentionSpec(12, 12, 32, 32**-0.5)
    assert AttentionSpec(12, 12, 32, 0.177).scale == 0.177


@ALL
@pytest.mark.parametrize("bias", [False, True])
def test_shape_says_all_of_a_spec(variant, bias):
    spec = variant.spec(3, 7, bias)
    assert AttentionSpec.from_shape(spec.shape()) == spec
    assert AttentionSpec.from_shape(json.loads(json.dumps(spec.shape()))) == spec
    more = {**spec.shape(), "precision": "bf16", "writes": "to_bf16"}
    assert AttentionSpec.from_shape(more) == spec


@pytest.mark.parametrize(
    "other", [{"kv_heads": 2}, {"bias": "by_distance"}, {"softcap": 30.0}], ids=str
)
def test_shape_says_what_no_kernel_has_yet(other):
    spec = dataclasses.replace(PLAIN, **other)
    assert AttentionSpec.from_shape(spec.shape()) == spec
    assert set(spec.shape().items()) - set(PLAIN.shape().items()) == set(other.items())


def test_variants_are_tasks_of_their_own():
    tasks = [Task("attention", variant.spec(3, 7).shape()) for variant in VARIANTS.values()]
    assert len({task.key for task in tasks}) == len({task.name for task in tasks}) == len(VARIANTS)
    assert all(task.name.isidentifier() for task in tasks)


def test_keys_of_the_shipped_logs_are_what_they_were():
    keys = set()
    for file in Path(tuning_logs.__file__).parent.glob("*/attention.jsonl"):
        for line in file.read_text().splitlines():
            logged = json.loads(line)["shape"]
            said = AttentionSpec.from_shape(logged).shape()
            rest = {name: value for name, value in logged.items() if name in OF_KERNELS}
            assert Task("attention", {**said, **rest}).key == Task("attention", logged).key
            keys.add(Task("attention", logged).key)
    assert len(keys) >= 10


@ALL
@pytest.mark.parametrize("length", [1, 2, 6, 13])
def test_a_query_sees_the_keys_that_it_should_and_itself(variant, length):
    places = np.arange(length)
    for query in range(length):
        seen = list(variant.spec(1, 1).key_range(query, length))
        assert seen == list(places[variant.sees(query, places)]) and query in seen


@ALL
def test_flops_counts_the_products_of_keys_that_are_seen(variant):
    spec, (i, j) = variant.spec(12, 64), np.indices((40, 40))
    products = 2 + len(spec.tables())
    seen = np.count_nonzero(variant.sees(i, j))
    assert spec.flops(40) == 2 * products * seen * spec.heads * 64


@ALL
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_what_loops_compute(variant, bias):
    rng = np.random.default_rng(0)
    spec, length = variant.spec(2, 3, bias), 11
    q, k, v = (rng.standard_normal((h, length, 3)) for h in (spec.heads, *[spec.kv_heads] * 2))
    mask, added = rng.standard_normal(length), rng.standard_normal((1, length, length))
    tables = {name: rng.standard_normal((2, 3, 2 * spec.last + 1)) for name in spec.tables()}
    context = spec.reference(q, k, v, mask, added if bias else None, **tables)
    for head, i in np.ndindex(spec.heads, length):
        shared, scores = head // variant.group, {}
        for j in filter(lambda j: variant.sees(i, j), range(length)):
            near = {n: t[head, :, max(-9, min(i - j, 9)) + 9] for n, t in tables.items()}
            score = q[head, i] @ k[shared, j]
            score += q[head, i] @ near.get("keys", np.zeros(3))
            score += k[shared, j] @ near.get("queries", np.zeros(3))
            scores[j] = score * spec.scale + mask[j] + (added[0, i, j] if bias else 0)
        weights = {j: np.exp(score) for j, score in scores.items()}
        mean = sum(w * v[shared, j] for j, w in weights.items()) / sum(weights.values())
        np.testing.assert_allclose(context[head, i], mean, rtol=1e-12)


def test_reference_shares_heads_of_keys_and_bounds_scores():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 5, 8)), *rng.standard_normal((2, 2, 5, 8))
    shared = AttentionSpec(4, 2, 8, 0.5, softcap=2.0)
    scores = q @ np.repeat(k, 2, 0).swapaxes(1, 2) * 0.5
    weights = np.exp(2 * np.tanh(scores / 2))
    expected = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 2, 0)
    np.testing.assert_allclose(shared.reference(q, k, v), expected, rtol=1e-12)


def test_a_bias_by_distance_is_the_tensor_with_one_number_a_diagonal():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 4, 6, 8))
    by_distance = rng.standard_normal((4, 1, 11))
    i, j = np.indices((6, 6))
    tensor = by_distance[:, 0][:, j - i + 5]
    by_diagonal, by_pair = (
        dataclasses.replace(PLAIN, bias=kind) for kind in ("by_distance", "tensor")
    )
    context = by_diagonal.reference(q, k, v, bias=by_distance)
    np.testing.assert_allclose(context, by_pair.reference(q, k, v, bias=tensor), rtol=1e-12)


def test_reference_refuses_a_bias_or_a_table_that_the_spec_does_not_name():
    q = np.zeros((4, 2, 8))
    with pytest.raises(ValueError, match="tables are 'none'"):
        PLAIN.reference(q, q, q, keys=np.zeros((4, 8, 3)))
    with pytest.raises(ValueError, match="tables are 'both'"):
        dataclasses.replace(PLAIN, relative="both", last=1).reference(q, q, q)
    with pytest.raises(ValueError, match="bias is 'none'"):
        PLAIN.reference(q, q, q, bias=np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="bias is 'tensor'"):
        dataclasses.replace(PLAIN, bias="tensor").reference(q, q, q)
