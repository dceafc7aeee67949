"""Matrices pruned in every pattern are recognised; chance and rounding are no pattern."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.numerics.zeros import BLOCKS, analyse, density

SHAPES = [(96, 64), (768, 48), (64, 304)]


def normal(shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def blocked(shape, block, zeros, seed=3):
    """A random matrix whose blocks (inputs, outputs) are zero with that chance."""
    sizes = [extent // size for extent, size in zip(shape, block)]
    kept = np.random.default_rng(seed + 1).random(sizes) >= zeros
    return normal(shape, seed) * np.kron(kept, np.ones(block))


def two_of_four(shape, seed=3):
    w = normal(shape, seed).reshape(-1, 4, shape[1])
    order = np.argsort(np.abs(w), axis=1)
    return np.where(np.argsort(order, axis=1) >= 2, w, 0).reshape(shape)


def rounded(w):
    """Symmetric 8 bits with one scale for the whole matrix, as quantizers write it."""
    return np.clip(np.rint(w / (np.abs(w).max() / 127)), -127, 127).astype("int8")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found_at_any_sparsity(name, zeros, shape):
    w = blocked(shape, BLOCKS[name], zeros)
    analysis = analyse(w)
    assert analysis.pattern == name
    assert analysis.zeros == pytest.approx(np.mean(w == 0))
    assert analyse(rounded(w)).pattern == name, "rounding adds zeros, and changes no pattern"


@pytest.mark.parametrize("zeros", [0.25, 0.5, 0.9, 0.97, 0.99, 0.999])
def test_zeros_anywhere_are_unstructured_however_many(zeros):
    assert analyse(blocked((768, 768), (1, 1), zeros)).pattern == "unstructured"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_of_four_is_found(shape):
    w = two_of_four(shape)
    analysis = analyse(w)
    assert (analysis.pattern, analysis.zeros) == ("2:4", 0.5)
    assert analyse(rounded(w)).pattern == "2:4"
    w[:3, 5] = 1
    assert analyse(w).pattern == "unstructured", "three of four in one group"


def test_two_of_four_by_chance_is_unstructured():
    w = np.zeros((768, 96))
    w[::16, ::3] = 1
    assert analyse(w).pattern == "unstructured"


def test_blocks_that_do_not_divide_the_matrix_are_not_considered():
    assert analyse(blocked((48, 30), (16, 1), 0.8)).pattern == "16x1"
    assert analyse(np.pad(blocked((48, 30), (16, 1), 0.8), ((0, 4), (0, 0)))).pattern == "4x1"
    whole_rows = blocked((96, 1), (1, 1), 0.8) * np.ones((1, 31))
    assert analyse(whole_rows).pattern == "unstructured"
    assert analyse(np.pad(whole_rows, ((0, 0), (0, 1)))).pattern == "1x16"
    assert analyse(blocked((97, 31), (1, 1), 0.8)).pattern == "unstructured"


def test_blocks_that_are_not_aligned_are_unstructured():
    w = blocked((96, 64), (4, 1), 0.7)
    assert analyse(np.roll(w, 2, axis=0)).pattern == "unstructured"


def test_few_zeros_are_dense():
    w = normal((768, 768))
    assert analyse(w) == analyse(w.T)
    assert analyse(w).pattern == "dense" and analyse(w).zeros == 0
    bytes_of_w = analyse(rounded(w))
    assert bytes_of_w.pattern == "dense" and 0.005 < bytes_of_w.zeros < 0.03
    assert analyse(blocked((96, 64), (4, 1), 0.15)).pattern == "dense"


def test_whole_rows_and_columns_are_counted():
    w = normal((32, 48))
    w[[3, 30]] = 0
    w[:, 7] = 0
    analysis = analyse(w)
    assert (analysis.zero_inputs, analysis.zero_outputs, analysis.pattern) == (2, 1, "dense")
    w[:16] = 0
    assert analyse(w).zero_inputs == 17


@pytest.mark.parametrize("shape", [(96, 64), (7, 5), (1, 1)], ids=str)
def test_matrix_of_zeros_has_a_pattern(shape):
    analysis = analyse(np.zeros(shape, "int8"))
    assert analysis.pattern == ("32x1" if shape == (96, 64) else "unstructured")
    assert (analysis.zeros, analysis.zero_inputs, analysis.zero_outputs) == (1, *shape)


def test_density_counts_lanes():
    w = np.zeros((8, 2))
    w[0, 0] = w[1, 0] = w[7, 1] = -0.5
    assert density(w, 1) == 3 / 16
    assert density(w, 2) == 2 / 8
    assert density(w, 4) == 2 / 4
    assert density(w[:7], 4) == 1 / 4, "the last lane has three inputs"
    assert density(np.ones((7, 3)), 4) == 1


@pytest.mark.parametrize(("name", "group"), [("4x1", 4), ("16x1", 4), ("32x1", 4)])
def test_density_of_blocks_is_that_of_the_elements(name, group):
    w = blocked((768, 64), BLOCKS[name], 0.9)
    assert density(w, group) == pytest.approx(np.mean(w != 0))
