"""Activations in fewer bits: values, ranges, and what lies beside them."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import arithmetic, lanes
from bertile.schedules.cpu.narrow import KINDS
from bertile.schedules.task import Task


def narrow(channels, kind, smooth=False):
    shape = {"channels": channels, "kind": kind}
    return Task("narrow", {**shape, "smooth": True} if smooth else shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 26, 64, 312])
def test_narrow_gives_back_its_values(kernels, kind, channels):
    assert kernels.mistake(narrow(channels, kind), blocks=3) is None


@pytest.mark.parametrize("kind", ["int8", "int8_static"])
def test_narrow_smooths_before_it_quantizes(kernels, kind):
    assert kernels.mistake(narrow(28, kind, smooth=True), blocks=2) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("channels", [28, 313])
def test_layer_norm_writes_both_forms(kernels, kind, smooth, channels):
    shape = {"channels": channels, "epsilon": 1e-12, "kind": kind}
    if smooth and kind != "bf16":
        shape["smooth"] = True
    assert kernels.mistake(Task("layer_norm", shape), blocks=3) is None


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_writes_both_forms(kernels, kind):
    shape = {"channels": 28, "epsilon": 1e-12, "ids": "int64_int64", "rows": "100_7", "kind": kind}
    assert kernels.mistake(Task("embedding", shape), blocks=2) is None


def test_embedding_reads_tables_of_float16(kernels):
    shape = {"channels": 28, "epsilon": 1e-12, "ids": "int64", "rows": "100", "precision": "fp16"}
    assert kernels.mistake(Task("embedding", shape), blocks=2) is None


def test_bytes_reach_both_ends_of_each_tokens_range(kernels):
    _, (packed, range_) = kernels.run(narrow(64, "int8"), blocks=2)
    rows = arithmetic.ungrouped(packed, "uint8")
    assert (rows.min(1) == 0).all() and (rows.max(1) == 255).all()
    assert (range_[:, 0] > 0).all()


def test_a_token_of_equal_values_is_kept(kernels):
    task = narrow(8, "int8")
    x = np.full((1, 8, BLOCK_TOKENS), 0.7, "float32")
    forms = [np.zeros((1, 2, BLOCK_TOKENS), "int32"), np.zeros((1, 2, BLOCK_TOKENS), "float32")]
    packed, range_ = kernels.call_all(kernels.build(task), [x], forms)
    assert np.allclose(arithmetic.dequantized_rows(packed, range_), 0.7)


def test_values_outside_a_static_range_are_clipped(kernels):
    x = np.linspace(-9, 9, 4 * BLOCK_TOKENS, dtype="float32").reshape(1, 4, BLOCK_TOKENS)
    limits = np.array([-5.0, 25.5], "float32")
    form = [np.zeros((1, 1, BLOCK_TOKENS), "int32")]
    (packed,) = kernels.call_all(kernels.build(narrow(4, "int8_static")), [x, limits], form)
    levels = arithmetic.ungrouped(packed, "uint8")
    expected = np.rint(np.clip((lanes.from_lanes(x) + 5) * 25.5, 0, 255))
    assert np.array_equal(levels, expected)


def test_bf16_is_rounded_to_the_nearest_value():
    x = np.random.default_rng(0).standard_normal((100, 8)).astype("float32")
    rounded = arithmetic.bf16_values(arithmetic.bf16_pairs(x))
    assert np.abs(rounded - x).max() <= np.abs(x).max() * 2.0**-9
