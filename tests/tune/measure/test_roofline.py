"""The work of a request, counted by hand."""

from __future__ import annotations

import pytest

from bertile.tune.measure import roofline


def test_work_counts_attention_by_sequence_and_a_pooler_by_first_tokens() -> None:
    pytest.importorskip("tvm")
    dense = {"inputs": 4, "outputs": 8, "activation": "none", "residual": False}
    attention = {"heads": 2, "head_size": 4, "scale": 0.5, "bias": False}
    kernels = [
        {"operation": "dense", "shape": dense, "calls": 2},
        {"operation": "attention", "shape": attention, "calls": 1},
        {"operation": "generic", "shape": {}, "calls": 3},
        {"operation": "first_token", "shape": {"channels": 4}, "calls": 1},
        {"operation": "dense", "shape": {**dense, "activation": "tanh"}, "calls": 1},
    ]
    batch, length = 3, 5
    products = 2 * 2 * batch * length * 4 * 8
    attention = batch * 4 * length * length * 2 * 4
    pooler = 2 * batch * 4 * 8
    assert roofline.request_flops(kernels, batch, length) == products + attention + pooler


def test_a_sparse_kernel_counts_the_multiply_adds_that_it_does() -> None:
    pytest.importorskip("tvm")
    shape = {"inputs": 64, "outputs": 8, "activation": "none", "residual": False}
    kernel = {"operation": "sparse", "calls": 3, "nonzeros": 20}
    for precision, lane in (("fp32", 1), ("bf16", 2), ("int8", 4), ("int8_static", 4)):
        sparse_kernel = {**kernel, "shape": {**shape, "precision": precision, "density": 10}}
        assert roofline.flops(sparse_kernel, 5, 1, 5) == 2 * 5 * 20 * lane
