"""The work of a request, counted by hand."""

from __future__ import annotations

import pytest

from bertile import work


def test_work_counts_attention_by_sequence_and_a_pooler_by_first_tokens() -> None:
    pytest.importorskip("tvm")
    dense = {"inputs": 4, "outputs": 8, "activation": "none", "residual": False}
    kernels = [
        {"operation": "dense", "shape": dense, "calls": 2},
        {"operation": "attention", "shape": {"heads": 2, "head_size": 4}, "calls": 1},
        {"operation": "generic", "shape": {}, "calls": 3},
        {"operation": "first_token", "shape": {"channels": 4}, "calls": 1},
        {"operation": "dense", "shape": {**dense, "activation": "tanh"}, "calls": 1},
    ]
    batch, length = 3, 5
    products = 2 * 2 * batch * length * 4 * 8
    attention = batch * 4 * length * length * 2 * 4
    pooler = 2 * batch * 4 * 8
    assert work.request_flops(kernels, batch, length) == products + attention + pooler
