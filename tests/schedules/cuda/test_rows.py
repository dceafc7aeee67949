"""Kernels that hold a row in registers (LayerNorm, embedding, bytes) and layouts, in the emulator,
against numpy.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import cuda_kernels
from helpers.cuda_kernels import slow

from bertile.cuda_loader import evaluate
from bertile.schedules import reference
from bertile.schedules.cuda import SCHEDULES
from bertile.schedules.cuda.forms import from_rows, symbols, to_rows, token_table
from bertile.schedules.cuda.layer_norm import layer_norm
from bertile.schedules.schedule import Sample
from bertile.schedules.task import Task

PRECISIONS = ("fp16", "bf16", "fp32")
KINDS = (("int8", "int8_static"), (False, True))  # with and without smoothing
# Every size and every precision, and all pairs of them where there is time.
EACH = [(768, "fp16"), (100, "bf16"), (13, "fp32")]
EACH += [slow(*case) for case in itertools.product((768, 100, 13), PRECISIONS) if case not in EACH]


def layer_norm_of(channels, precision="fp16", epsilon=1e-12, **more):
    shape = {"channels": channels, "epsilon": epsilon, "precision": precision}
    return Task("layer_norm", {**shape, **more})


def embedding_of(channels, precision="fp16", **more):
    shape = {"channels": channels, "epsilon": 1e-12, "ids": "int64_int32_int64"}
    return Task("embedding", {**shape, "rows": "300_2_512", "precision": precision, **more})


def narrow_of(channels, kind, precision="fp16", **more):
    return Task("narrow", {"channels": channels, "kind": kind, "precision": precision, **more})


@pytest.mark.parametrize(
    ("channels", "precision"),
    [
        *itertools.product([768, 1024, 312, 13, 2], ["fp16"]),
        *itertools.product([312, 13], ["bf16", "fp32"]),
        *itertools.starmap(slow, itertools.product([768, 1024, 2], ["bf16", "fp32"])),
    ],
)
def test_layer_norm_equals_numpy(channels, precision):
    assert cuda_kernels.mistake(layer_norm_of(channels, precision)) is None


@pytest.mark.parametrize(("channels", "precision"), [(313, "fp16"), (13, "fp32")])
def test_rms_norm_equals_numpy(channels, precision):
    assert cuda_kernels.mistake(layer_norm_of(channels, precision, 1e-6, rms=True)) is None
    bytes_too = layer_norm_of(channels, precision, 1e-6, rms=True, kind="int8")
    assert cuda_kernels.mistake(bytes_too) is None


@pytest.mark.parametrize("cut", [(1, 4), (3, 2), (8, 4), *map(slow, [(2, 1), (4, 2), (6, 1)])])
def test_layer_norm_equals_numpy_at_every_cut_of_a_row(cut):
    task = layer_norm_of(1000, kind="int8", smooth=True)
    knobs = dict(zip(("warps", "rows", "few_warps", "few_rows"), (*cut, 1, 1)))
    assert cuda_kernels.mistake(task, knobs={**knobs, "few": 0}) is None
    knobs = dict(zip(("few_warps", "few_rows", "warps", "rows"), (*cut, 1, 1)))
    assert cuda_kernels.mistake(task, knobs={**knobs, "few": 512}) is None


@pytest.mark.parametrize("rows", [1, 511, 512])
def test_rows_are_few_or_many(rows):
    row = cuda_kernels.row_of("cuda-sm90")
    knobs = {**layer_norm.default(layer_norm_of(768), row), "few": 512}
    first, second = layer_norm.kernel(layer_norm_of(768), knobs, row).launches
    launched = [evaluate(launch.when, {"rows": rows}) for launch in (first, second)]
    assert launched == ([0, 1] if rows == 512 else [1, 0])


def test_layer_norm_of_a_very_wide_row_equals_numpy():
    assert cuda_kernels.mistake(layer_norm_of(4096)) is None


def test_layer_norm_keeps_its_digits_far_from_zero():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 768)) + 1000).astype("float32")
    gamma, beta = np.ones(768, "float32"), np.zeros(768, "float32")
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, 1e-12)
    extents = symbols(3, 3)
    sample = Sample([x], [gamma, beta], expected, [np.zeros_like(x)], symbols=extents)
    result = cuda_kernels.run(layer_norm_of(768, "fp32"), sample)[0]
    # float32 holds 1000 to 6e-5: as E[x²] - E[x]² the variance would be off by a tenth
    assert np.abs(result - expected).max() < 5e-4


def test_layer_norm_adds_epsilon_to_the_variance():
    x = np.full((1, 16), 3.0, "float32")  # no variance at all
    x[0, 0] += 1e-3
    gamma, beta = np.ones(16, "float32"), np.full(16, 2.0, "float32")
    expected = reference.layer_norm(x.astype("float64"), gamma, beta, 1e-3)
    sample = Sample([x], [gamma, beta], expected, [np.zeros_like(x)], symbols=symbols(1))
    result = cuda_kernels.run(layer_norm_of(16, "fp32", 1e-3), sample)[0]
    assert np.abs(result - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("make", "kind", "smooth"),
    [
        *itertools.product([layer_norm_of], *KINDS),
        (embedding_of, "int8", True),
        slow(embedding_of, "int8", False),
        *(slow(embedding_of, "int8_static", smooth) for smooth in (False, True)),
    ],
)
def test_what_normalises_writes_bytes_too(make, kind, smooth):
    more = {"kind": kind, "smooth": True} if smooth else {"kind": kind}
    assert cuda_kernels.mistake(make(313, **more)) is None


@pytest.mark.parametrize(
    ("channels", "precision", "kind", "smooth"),
    [
        *itertools.product([3072], ["fp16"], *KINDS),
        (100, "bf16", "int8", True),
        (5, "fp32", "int8_static", False),
        slow(100, "bf16", "int8", False),
        *(slow(100, "bf16", "int8_static", smooth) for smooth in (False, True)),
        *(slow(5, "fp32", "int8", smooth) for smooth in (False, True)),
        slow(5, "fp32", "int8_static", True),
    ],
)
def test_narrow_equals_numpy(channels, precision, kind, smooth):
    more = {"smooth": True} if smooth else {}
    assert cuda_kernels.mistake(narrow_of(channels, kind, precision, **more)) is None


def test_narrow_gives_a_range_to_a_row_of_equal_values():
    x = np.full((2, 16), 0.5, "float16")
    x[1] = 0.0
    expected = np.zeros((1, 2, 16), "float32")
    results = [np.zeros((2, 16), "uint8"), np.zeros((2, 2), "float32")]
    sample = Sample([x], [], expected, results, symbols=symbols(2))
    q, range_ = cuda_kernels.run(narrow_of(16, "int8"), sample)
    assert not q.any()
    np.testing.assert_array_equal(range_[:, 1], [0.5, 0.0])
    assert (range_[:, 0] > 0).all()


@pytest.mark.parametrize(("channels", "precision"), EACH)
def test_embedding_equals_numpy(channels, precision):
    assert cuda_kernels.mistake(embedding_of(channels, precision), blocks=4) is None


def test_embedding_clamps_ids_outside_the_table_and_repeats_a_short_row_of_ids():
    task = Task(
        "embedding",
        {"channels": 16, "epsilon": 1e-3, "ids": "int64_int32", "rows": "5_2", "precision": "fp32"},
    )
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((n, 16)).astype("float32") for n in (5, 2)]
    gamma, beta = np.ones(16, "float32"), np.zeros(16, "float32")
    ids = np.array([[-7, 1 << 40, 5, 4]])
    types = np.array([[1]], "int32")  # one type for all tokens
    rows = tables[0][[0, 4, 4, 4]] + tables[1][1]
    expected = reference.layer_norm(rows.astype("float64"), gamma, beta, 1e-3)
    of = symbols(16, 1, 4, ids0_0=1, ids0_1=4, ids1_0=1, ids1_1=1)
    result = np.zeros((16, 16), "float32")
    weights = [*tables, gamma, beta]
    sample = Sample([ids, types, token_table([4])], weights, expected, [result], symbols=of)
    result = cuda_kernels.run(task, sample)[0]
    assert np.abs(result[:4] - expected).max() < 1e-5
    assert np.isfinite(result).all()


@pytest.mark.parametrize(("channels", "precision"), EACH)
@pytest.mark.parametrize(
    "operation", ["tokens_in", "tokens_out", "rows_in", "rows_out", "first_token"]
)
def test_layouts_equal_numpy(operation, channels, precision):
    task = Task(operation, {"channels": channels, "precision": precision})
    for blocks in (1, 4):
        assert cuda_kernels.mistake(task, blocks=blocks) is None


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_key_mask_equals_numpy(blocks):
    assert cuda_kernels.mistake(Task("key_mask"), blocks=blocks) is None


def test_key_mask_of_one_row_serves_all():
    mask = np.array([0.0, -1.0, -2.0], "float32").reshape(1, 1, 1, 3)
    table, extents = token_table([3, 2]), symbols(32, 2, 3, mask_0=1)
    expected = np.zeros(32, "float32")
    sample = Sample([mask, table], [], expected, symbols=extents)
    result = cuda_kernels.run(Task("key_mask"), sample)[0].reshape(2, 16)
    np.testing.assert_array_equal(result[:, :3], [[0, -1, -2], [0, -1, -2]])
    assert (result[:, 3:] == np.float32(-1e30)).all()


def test_tokens_of_one_row_serve_all():
    x = np.arange(40, dtype="float32").reshape(1, 5, 8)
    table, extents = token_table([5, 3]), symbols(32, 2, 5, x_0=1)
    expected = np.zeros((2, 16, 16), "float32")
    expected[:, :5, :8] = x
    sample = Sample([x, table], [], expected.reshape(32, 16), symbols=extents)
    task = Task("tokens_in", {"channels": 8, "precision": "fp32"})
    np.testing.assert_array_equal(cuda_kernels.run(task, sample)[0], sample.expected)


def test_tokens_out_writes_zeros_behind_a_short_sequence():
    x = np.ones((48, 16), "float16")
    table, extents = token_table([20, 3]), symbols(48, 2, 100)
    expected = np.zeros((2, 100, 16), "float32")
    expected[0, :32] = expected[1, :16] = 1.0
    sample = Sample([x, table], [], expected, symbols=extents)
    task = Task("tokens_out", {"channels": 16, "precision": "fp16"})
    np.testing.assert_array_equal(cuda_kernels.run(task, sample)[0], expected)


def test_stored_values_come_back():
    x = np.random.default_rng(0).standard_normal((3, 13)).astype("float32")
    for kind, digits in (("f16", 2.0**-11), ("bf16", 2.0**-8), ("float", 0.0)):
        assert np.abs(from_rows(to_rows(x, kind), 13) - x).max() <= digits * np.abs(x).max()


@pytest.mark.parametrize("row", cuda_kernels.ROWS)
def test_defaults_lie_in_their_own_spaces(row):
    target = cuda_kernels.row_of(row)
    for channels in (32, 768, 4096):
        for task in (layer_norm_of(channels), embedding_of(channels), narrow_of(channels, "int8")):
            schedule = SCHEDULES[task.operation]
            assert schedule.valid(task, target, schedule.default(task, target))


@pytest.mark.parametrize("row", ["cuda-sm75", "cuda-sm90"])
def test_a_row_stays_in_registers(row):
    cuda_kernels.assert_fits(layer_norm_of(1024, kind="int8", smooth=True), row)


@pytest.mark.slow
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_row_kernel_fits_every_row_of_gpus(precision, row):
    if precision == "bf16" and not cuda_kernels.row_of(row).gpu.bf16:
        row = "cuda-sm80"
    layouts = ("tokens_in", "tokens_out", "rows_in", "rows_out", "first_token")
    tasks = [Task(name, {"channels": 768, "precision": precision}) for name in layouts]
    tasks += [layer_norm_of(768, precision, kind="int8"), embedding_of(768, precision)]
    tasks += [narrow_of(3072, "int8", precision), narrow_of(768, "int8_static", precision)]
    for task in tasks:
        cuda_kernels.assert_fits(task, row)
