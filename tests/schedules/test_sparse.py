"""Sparse matrix products against numpy and against the dense kernel, and how weights are packed."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import tvm_ffi
from helpers.spread import spread
from tvm import tirx

from bertile.schedules.cpu import arithmetic
from bertile.schedules.cpu.dense import dense
from bertile.schedules.cpu.sparse import sparse
from bertile.schedules.cpu.vector_math import ACTIVATIONS
from bertile.schedules.task import Task
from bertile.targets import rows

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8_static")


def product(inputs, outputs, activation="none", residual=False, density=20, **more):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    return Task("sparse", {**shape, **more, "density": density})


def as_dense(task):
    return Task("dense", {k: v for k, v in task.shape.items() if k != "density"})


MIDDLE = "x86-avx512"
ROWS = ("x86-avx512-bf16", "x86-avx2", MIDDLE)
SHAPES = [(768, 768), (13, 17), (26, 26), (312, 100), (97, 2), (1, 5)]


def on_rows(names, kinds, cases, share=2):
    """The middle row differs from the others in one instruction: it is for the slow tests."""
    return spread(names, ROWS, kinds, cases, share, late={(MIDDLE, kind) for kind in kinds})


@pytest.fixture
def kernels(request, kernels_of):
    return kernels_of(request.param)


@on_rows("precision shape", PRECISIONS, SHAPES, share=5)
def test_product_equals_numpy(kernels, precision, shape):
    assert kernels.mistake(product(*shape, precision=precision), blocks=3) is None


@on_rows("precision blocks", PRECISIONS, [1, 2, 3, 7, 8, 33], share=1)
def test_product_takes_any_number_of_blocks(kernels, precision, blocks):
    task = product(64, 40, "relu", residual=True, precision=precision)
    assert kernels.mistake(task, blocks) is None


RESULTS = [("to_bf16", "none"), ("to_bf16", "gelu"), ("to_int8", "gelu"), ("to_int8", "none")]


@on_rows("precision result", PRECISIONS, RESULTS, share=6)
def test_product_writes_what_the_next_layer_reads(kernels, precision, result):
    writes, activation = result
    task = product(52, 44, activation, precision=precision, writes=writes)
    assert kernels.mistake(task, blocks=3) is None


@on_rows("precision values_from", PRECISIONS, [24])
def test_values_are_written_in_pairs_of_tokens(kernels, precision, values_from):
    task = product(52, 36, precision=precision, writes="to_bf16", values_from=values_from)
    assert kernels.mistake(task, blocks=5) is None


@on_rows("precision seed", PRECISIONS, range(4), share=8)
def test_any_point_of_the_space_is_right(kernels, precision, seed):
    task = product(520, 84, "gelu", True, precision=precision, writes="to_bf16")
    (knobs,) = kernels.points(task, 1, seed)
    assert kernels.mistake(task, 13, knobs) is None, knobs


@on_rows("activation residual", list(ACTIVATIONS), [False, True], share=4)
def test_activation_comes_before_the_residual(kernels, activation, residual):
    assert kernels.mistake(product(32, 33, activation, residual), blocks=3) is None


@on_rows("precision density", ["int8"], [1, 5, 50, 100])
def test_lists_may_have_any_length(kernels, precision, density):
    assert kernels.mistake(product(96, 48, density=density, precision=precision), blocks=5) is None


def outcome(kernels, task, x, weights, blocks):
    """What the kernel of a task makes of these operands."""
    schedule = {"dense": dense, "sparse": sparse}[task.operation]
    knobs = schedule.default(task, kernels.row)
    operands = [*x, *schedule.pack(task, knobs, weights, kernels.row)]
    shape = (blocks, task.shape["outputs"], 16)
    return kernels.call(kernels.build(task, knobs), operands, shape)


@on_rows("precision cut", ["int8"], [(1, 48), (48, 48), (49, 96), (192, 192)])
def test_there_are_as_many_shares_as_threads_at_least(kernels, precision, cut):
    """Of which most have no work: 2 blocks by 4 groups of outputs."""
    threads, shares = cut
    task, row = product(96, 48, precision=precision), replace(kernels.row, threads=threads)
    func = sparse.kernel(task, {**sparse.default(task, row), "groups": 4}, row)
    loops = []
    tvm_ffi.structural_walk(func.body, (tirx.For, loops.append))
    parallel = [loop for loop in loops if loop.kind == tirx.ForKind.PARALLEL]
    assert [int(loop.extent) for loop in parallel] == [shares]
    sample = sparse.sample(task, 2, np.random.default_rng(0))
    weights = sparse.pack(task, {**sparse.default(task, row), "groups": 4}, sample.weights, row)
    operands = [*sample.activations, *weights]
    results = kernels.call_all(kernels.compile(func), operands, sample.buffers())
    assert sample.mistake(results) is None


ZEROS = {
    "no lane": lambda w: w * 0,
    "outputs": lambda w: w * (np.arange(w.shape[1]) % 3 == 1),
    "inputs": lambda w: w * (np.arange(len(w)) >= 60)[:, None],
    "one output": lambda w: w * (np.arange(w.shape[1]) == 7),
    "nothing": lambda w: w,
    "negative zeros": lambda w: np.where(np.arange(len(w))[:, None] % 2, w, -0.0 * np.abs(w)),
}


@on_rows("precision zeros", ["fp32", "int8_static"], list(ZEROS), share=1)
def test_sums_equal_the_dense_kernel_s(kernels, precision, zeros):
    """Bit for bit for bytes; sums of floats are taken in another order."""
    rng, blocks = np.random.default_rng(0), 3
    task = product(122, 45, "gelu", residual=True, precision=precision)
    sample = sparse.sample(task, blocks, rng)
    w = ZEROS[zeros](rng.integers(-127, 128, (122, 45)).astype("float32"))
    w = w / 512 if precision == "fp32" else w.astype("int8")
    operands = sample.activations, [w, *sample.weights[1:]], blocks
    sums = outcome(kernels, task, *operands)
    expected = outcome(kernels, as_dense(task), *operands)
    if precision == "fp32":
        np.testing.assert_allclose(sums, expected, atol=1e-4)
    else:
        assert np.array_equal(sums, expected)


def test_pack_keeps_every_lane_that_is_not_zero_once():
    task = product(768, 96, density=10)
    knobs = {
        "accumulators": 16,
        "token_blocks": 4,
        "parts": 3,
        "groups": 4,
    }
    rng = np.random.default_rng(0)
    w = rng.standard_normal((768, 96)).astype("float32") * (rng.random((768, 96)) < 0.1)
    b = rng.standard_normal(96).astype("float32")
    values, index, starts, slots, lanes, bias = sparse.pack(task, knobs, [w, b], rows.TABLE[0])
    assert (index.dtype, slots.dtype) == ("uint8", "uint8")
    unpacked = np.zeros_like(w)
    for panel, (start, end) in enumerate(itertools.pairwise(starts)):
        group, part, inside = panel // 6 // 3, panel // 6 % 3, panel % 6
        for entry in range(start * 4, end * 4):
            channel = lanes[group, slots[group, part, inside * 4 + entry % 4]]
            unpacked[part * 256 + int(index[entry]), channel] += values[entry]
    assert np.array_equal(unpacked, w)
    assert np.array_equal(bias, b[lanes.ravel()])
    assert len(values) < 1.1 * np.count_nonzero(w)


def test_lists_are_small():
    """BERT-base's linear layers in int8, nine of ten 4x1 blocks zero: values, indices and all."""
    row, rng = rows.resolve("x86-avx512-vnni"), np.random.default_rng(0)
    sizes: dict[str, int] = {}
    for inputs, outputs in [(768, 2304), (768, 768), (768, 3072), (3072, 768)]:
        sparse_task = product(inputs, outputs, precision="int8", density=10)
        w = rng.integers(1, 127, (inputs, outputs)).astype("int8")
        w[rng.permutation(inputs // 4 * outputs).reshape(-1, outputs).repeat(4, 0) % 10 > 0] = 0
        vectors = [np.ones(outputs, "float32")] * 3
        for schedule, task in ((sparse, sparse_task), (dense, as_dense(sparse_task))):
            arrays = schedule.pack(task, schedule.default(task, row), [w, *vectors], row)
            sizes[schedule.operation] = sizes.get(schedule.operation, 0) + sum(
                array.nbytes for array in arrays
            )
    assert sizes["sparse"] <= 0.16 * sizes["dense"]


@pytest.mark.parametrize("kernels", ("x86-avx512-bf16", "x86-avx2"), indirect=True)
def test_bytes_at_their_limits_do_not_overflow(kernels):
    """Both ends of bytes, side by side in every way: what saturates counts twice, as two halves."""
    rng = np.random.default_rng(0)
    x = rng.choice([0, 1, 254, 255], (16, 52)).astype("uint8")
    w = rng.choice([-127, -126, -64, -1, 0, 64, 65, 126, 127], (52, 12)).astype("int8")
    x[0], w[:, 0], w[:, 1] = 255, 127, -127
    task = product(52, 12, precision="int8_static")
    knobs = sparse.default(task, kernels.row)
    ones, zeros = np.ones(12, "float32"), np.zeros(12, "float32")
    weights = sparse.pack(task, knobs, [w, ones, zeros], kernels.row)
    operands = [arithmetic.grouped(x, 4), *weights]
    sums = kernels.call(kernels.build(task, knobs), operands, (1, 12, 16))
    assert np.array_equal(sums[0].T, x.astype("float32") @ w.astype("float32"))


def test_halves_of_a_lane_are_its_weights_and_never_saturate():
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (64, 40)).astype("int8")
    w[:4], w[4:8] = rng.integers(-64, 65, (4, 40)), -128
    both = arithmetic.halves(
        np.ascontiguousarray(w.reshape(16, 4, 40).swapaxes(1, 2)).view("int32")[..., 0]
    )
    parts = both.view("int8").reshape(16, 2, 40, 4).astype(int)
    assert np.array_equal(parts.sum(1).swapaxes(1, 2).reshape(64, 40), w)
    for pairs in (parts[..., :2], parts[..., 2:]):
        positive, negative = (pairs.clip(0).sum(-1), pairs.clip(None, 0).sum(-1))
        assert 255 * positive.max() < 2**15 and 255 * negative.min() >= -(2**15)
    assert not parts[0, 1].any()  # what is within the bound stays one entry


def test_groups_get_equal_work():
    rng = np.random.default_rng(0)
    counts = np.sort(rng.integers(0, 192, 768))  # the last outputs have the longest lists
    w = (rng.permuted(np.tile(np.arange(192)[:, None], 768), axis=0) < counts).repeat(4, 0)
    task = product(768, 768, precision="int8_static")
    knobs = {
        "accumulators": 16,
        "token_blocks": 4,
        "parts": 1,
        "groups": 8,
    }
    _, _, starts, *_ = sparse.pack(task, knobs, [w.astype("int8")], rows.TABLE[0])
    entries = np.diff(starts[:: len(starts) // 8])
    assert entries.max() <= 1.02 * entries.min()


def test_flops_counts_two_per_multiply_add_of_a_lane_that_is_not_zero():
    assert sparse.flops(product(768, 3072, "gelu", density=10), 128) == 2 * 128 * 768 * 3072 / 10


BERT = [
    product(768, 2304, density=10, precision="int8", writes="to_bf16", values_from=1536),
    product(768, 768, residual=True, density=10, precision="int8_static"),
    product(768, 3072, "gelu", density=10, precision="int8_static", writes="to_int8"),
    product(3072, 768, residual=True, density=10),
    product(768, 2),
    product(5, 1),
]


@pytest.mark.parametrize("task", BERT, ids=lambda task: task.name)
@pytest.mark.parametrize("row", rows.TABLE, ids=lambda row: row.name)
def test_default_lies_in_its_own_space(task, row):
    assert sparse.valid(task, row, sparse.default(task, row))


@pytest.mark.parametrize(
    ("precision", "instruction"),
    [("fp32", "vfmadd231ps"), ("int8_static", "vpdpbusd"), ("bf16", "vdpbf16ps")],
)
def test_inner_loop_keeps_its_sums_in_registers(kernels_of, precision, instruction):
    text = kernels_of("x86-avx512-bf16").build(product(768, 768, precision=precision))
    text = text.inspect_source("asm")
    loops = re.split(r"\n\.L\w+:", text)
    busiest = max(loops, key=lambda block: block.count(instruction))
    assert busiest.count(instruction) == 8
    assert not re.search(r"%zmm\d+, .*\(%r[sb]p", busiest), "spilled"
    # four weights are loaded at once, four indices too, and no index passes through a vector
    assert len(re.findall(r"\tvbroadcast|\tvpbroadcast", busiest)) == 1
    assert not re.search(r"\tvpextr|\tvmov[dq]\t", busiest)
