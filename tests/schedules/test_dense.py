"""Matrix products in lanes against numpy, and what their inner loop compiles to."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bertile.schedules.cpu.dense import dense
from bertile.schedules.cpu.dense_kernel import Layout
from bertile.schedules.cpu.vector_math import ACTIVATIONS
from bertile.schedules.task import Task
from bertile.targets import rows

# Sums of up to 4096 products of the size of 1 in float32, in another order than numpy's float64.
TOLERANCE = 3e-5


def product(inputs, outputs, activation="none", residual=False):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    return Task("dense", shape)


BERT = [
    product(768, 2304),
    product(768, 768, residual=True),
    product(768, 3072, "gelu"),
    product(3072, 768, residual=True),
    product(384, 1152),
    product(384, 1536, "gelu"),
    product(1536, 384, residual=True),
    product(1024, 4096, "gelu"),
    product(4096, 1024, residual=True),
    product(312, 936),
    product(312, 1200, "gelu_tanh"),
    product(1200, 312, residual=True),
    product(768, 768, "tanh"),
    product(768, 2),
]


# BERT-large's, MiniLM's and a student's: the same code as BERT-base's
LARGE = BERT[4:12]


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=[pytest.mark.slow] if t in LARGE else [], id=t.name) for t in BERT],
)
def test_dense_equals_numpy_on_bert_shapes(kernels, task):
    assert kernels.difference(task, blocks=2) < TOLERANCE


@pytest.mark.parametrize("shape", [(13, 17), (26, 26), (312, 1000), (312, 2), (128, 1), (1, 5)])
def test_dense_equals_numpy_on_odd_sizes(kernels, shape):
    assert kernels.difference(product(*shape), blocks=3) < TOLERANCE


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 31, 33, 64, 65])
def test_dense_takes_any_number_of_blocks(kernels, blocks):
    assert kernels.difference(product(64, 40, "relu", residual=True), blocks) < TOLERANCE


@pytest.mark.parametrize(("width", "unroll", "lines"), [(6, 4, 2), (13, 4, 4), (26, 4, 7)])
def test_every_line_of_the_next_panel_is_asked_for(width, unroll, lines):
    """A panel's rows lie one behind the other: 4 bytes an output, 64 a line."""
    knobs = {"accumulators": width, "token_blocks": 1, "unroll": unroll, "passes": 1}
    row = rows.resolve("x86-avx512", 1)
    func = dense.kernel(product(96, 78), {**knobs, "panels": 1, "chunk": 4, "order": 0}, row)
    assert len(re.findall(r'T.call_extern\("int32", "bertile_prefetch2"', func.script())) == lines


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dense_applies_activation_before_residual(kernels, activation, residual):
    assert kernels.difference(product(32, 33, activation, residual), blocks=3) < TOLERANCE


def knobs_of(kernels, task, **changed):
    return {**dense.default(task, kernels.row), **changed}


@pytest.mark.parametrize(
    "changed",
    [
        {"passes": 2},
        {"passes": 3, "panels": 16},
        {"passes": 2, "unroll": 8},
        {"panels": 16},
        {"token_blocks": 1},
        {"token_blocks": 3, "passes": 2},
        {"chunk": 8},
        {"order": 0},
        {"order": 0, "chunk": 16},
        {"accumulators": 4, "token_blocks": 2, "passes": 2},
    ],
    ids=str,
)
def test_dense_equals_numpy_at_edges_of_its_space(kernels, changed):
    task = product(456, 100, "gelu", residual=True)  # 100 outputs: the last panel is padded
    for blocks in (1, 7, 31):
        assert kernels.difference(task, blocks, knobs_of(kernels, task, **changed)) < TOLERANCE


RANDOM = [product(312, 100, "gelu", residual=True), product(520, 31), product(96, 1000, "tanh")]


@pytest.mark.parametrize("task", RANDOM, ids=lambda task: task.name)
def test_dense_equals_numpy_at_random_points(kernels, task):
    for knobs in kernels.points(task, 2):
        assert kernels.difference(task, 11, knobs) < TOLERANCE, knobs


@pytest.mark.slow
@pytest.mark.parametrize("task", [*RANDOM, *BERT], ids=lambda task: task.name)
def test_dense_equals_numpy_at_many_random_points(kernels, task):
    for knobs in kernels.points(task, 12, seed=1):
        assert kernels.difference(task, 13, knobs) < TOLERANCE, knobs


def test_pack_orders_panels_front_to_back():
    w, b = np.arange(12, dtype="float32").reshape(2, 6), np.arange(6, dtype="float32")
    knobs = {"accumulators": 9, "token_blocks": 2}
    packed, bias = dense.pack(product(2, 6), knobs, [w, b], rows.TABLE[0])
    assert packed.tolist() == [[[0, 1, 2, 3], [6, 7, 8, 9]], [[4, 5, 0, 0], [10, 11, 0, 0]]]
    assert bias.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_flops_counts_two_per_multiply_add():
    assert dense.flops(product(768, 3072, "gelu"), 128) == 2 * 128 * 768 * 3072


@pytest.mark.parametrize("task", BERT, ids=lambda task: task.name)
@pytest.mark.parametrize("row", rows.TABLE, ids=lambda row: row.name)
def test_default_lies_in_its_own_space(task, row):
    assert dense.valid(task, row, dense.default(task, row))


def inner_loop(assembly: str) -> list[str]:
    """The instructions of the loop without a loop inside that multiplies most."""
    loops = []
    for label, body in re.findall(r"^(\.LBB\w+):\n((?:(?!^\.LBB)[^\n]*\n)*)", assembly, re.M):
        lines = [line.strip() for line in body.splitlines() if line.startswith("\t")]
        jumps = [i for i, line in enumerate(lines) if re.fullmatch(rf"j\w+\s+{label}", line)]
        if jumps:
            loops.append(lines[: jumps[0]])
    return max(loops, key=lambda lines: sum("vfmadd" in line for line in lines))


@pytest.mark.parametrize("task", BERT[:8], ids=lambda task: task.name)
def test_inner_loop_keeps_its_accumulators_in_registers(kernels, task):
    loop = inner_loop(kernels.build(task).inspect_source("asm"))
    knobs, row = dense.default(task, kernels.row), kernels.row
    vectors = 16 * 32 // row.vector_bits
    multiply_adds = [line for line in loop if "vfmadd" in line]
    tile = Layout.of(task, knobs, row).width * knobs["token_blocks"]
    assert len(multiply_adds) == tile * knobs["unroll"] * vectors
    assert not [line for line in loop if "(%rsp)" in line], "spilled"
    assert not [line for line in loop if re.match(r"vmov\w+\s+%[xyz]mm\d+, .*\(", line)], "stores"
    assert all(("%zmm" if row.vector_bits == 512 else "%ymm") in line for line in multiply_adds)


@pytest.mark.parametrize("task", BERT[:3], ids=lambda task: task.name)
def test_assembly_uses_the_vectors_of_its_row_and_no_scalar_library(kernels, task):
    assembly = kernels.build(task).inspect_source("asm")
    assert ("%zmm" in assembly) == (kernels.row.vector_bits == 512)
    assert not re.search(r"\b(expf|erff|tanhf)\b", assembly)
