"""A masked token has no weight, however large the scores are, in every precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.planned import BF16, PLAIN, VNNI, compiled

from bertile.backends.cpu import precision_plan
from bertile.graph import importer, order

LARGE = 3e4  # times the queries: scores of some ten thousand
TRIES = {"fp32": PLAIN, "bf16": BF16, "int8": VNNI}


@pytest.fixture(scope="module")
def graph(exported):
    """The two-layer model with large queries: the mask of -10000 would be seen through."""
    graph = order.optimize(importer.import_onnx(exported))
    params = dict(graph.params)
    for name in (name for name in params if "query_key_value" in name):
        params[name] = params[name].copy()
        params[name][..., : params[name].shape[-1] // 3] *= LARGE
    return dataclasses.replace(graph, params=params)


def hide(arrays, token):
    """Mask tokens behind the first, in the middle and at the end, and write that id there."""
    mask = np.ones_like(arrays["attention_mask"])
    mask[0, 1:20] = mask[1, 5:9] = mask[1, -3:] = 0
    arrays["attention_mask"][...] = mask
    arrays["input_ids"][mask == 0] = token


@pytest.mark.parametrize("precision", TRIES)
def test_masked_tokens_are_not_seen_where_scores_are_large(graph, precision, exported, tmp_path):
    planned = precision_plan.plan_layers(graph, precision, TRIES[precision])
    call = compiled(planned, TRIES[precision], tmp_path, exported)
    first, _ = call(2, 40, lambda arrays: hide(arrays, 7))
    second, _ = call(2, 40, lambda arrays: hide(arrays, 990))
    for seven, other in zip(first, second, strict=True):
        assert np.isfinite(seven).all()
        np.testing.assert_array_equal(seven, other)


def test_a_row_that_is_all_masked_is_finite_and_leaves_the_others_alone(graph, exported, tmp_path):
    call = compiled(graph, PLAIN, tmp_path, exported)

    def empty(arrays):
        hide(arrays, 7)
        arrays["attention_mask"][0] = 0

    (tokens, pooled), _ = call(2, 40, lambda arrays: hide(arrays, 7))
    (tokens_beside, pooled_beside), _ = call(2, 40, empty)
    assert np.isfinite(pooled_beside).all()
    np.testing.assert_array_equal(pooled[1], pooled_beside[1])
    np.testing.assert_array_equal(tokens[-33:], tokens_beside)
