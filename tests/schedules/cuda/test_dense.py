"""Dense layers for GPUs, in the emulator, against numpy in float64; what their code takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import cuda_kernels
from helpers.cuda_kernels import slow

from bertile.codegen.cuda import compiler, cubin
from bertile.cuda_loader import evaluate
from bertile.run.cuda import emulator
from bertile.schedules.cuda.dense import dense
from bertile.schedules.cuda.dense_samples import row_sample
from bertile.schedules.cuda.dense_tile import Tile
from bertile.schedules.task import Task

PRECISIONS = ("fp16", "bf16", "tf32", "fp32", "int8", "int8_static")
SHAPES = [(100, 72), (64, 48), (17, 5), (256, 200), (384, 96), (40, 130)]
MANY = {"few": 0, "some": 0}  # the entry for many rows, for any number of them


def task_of(inputs=100, outputs=72, activation="none", residual=False, precision="fp16", **more):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    return Task("dense", {**shape, "precision": precision, **more})


def mistake(task, rows, row="cuda-sm90", knobs=None, seed=0):
    """What is wrong with the product of so many rows, by the default with some knobs changed."""
    sample = row_sample(task, rows, np.random.default_rng(seed))
    knobs = {**dense.default(task, cuda_kernels.row_of(row)), **(knobs or {})}
    return sample.mistake(cuda_kernels.run(task, sample, row, knobs, seed))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dense_equals_numpy_in_odd_sizes(precision):
    task = task_of(residual=True, precision=precision)
    assert mistake(task, 37) is None
    assert mistake(task, 37, knobs=MANY) is None


@pytest.mark.parametrize(
    "activation, precision",
    [
        *((activation, "fp16") for activation in ("relu", "gelu", "gelu_tanh", "tanh", "silu")),
        slow("gelu", "fp32"),
    ],
)
def test_dense_applies_the_activation(activation, precision):
    assert mistake(task_of(64, 40, activation, True, precision), 21) is None


@pytest.mark.parametrize(
    "precision", ["fp16", "int8", "int8_static", *map(slow, ("bf16", "tf32", "fp32"))]
)
def test_dense_writes_bytes_and_pads_with_zeros(precision):
    task = task_of(40, 51, "gelu", precision == "int8", precision, writes="to_int8")
    assert mistake(task, 18) is None


GATED = {"outputs": 102, "activation": "gelu", "gated": True}
TURNED = {"outputs": 51, "turned": 2, "head_size": 10}
BY_GROUPS = {**MANY, "many_tensor": 1, "many_rows": 64, "many_columns": 96}


@pytest.mark.parametrize("shape", [GATED, TURNED], ids=["gated", "turned"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp32", *map(slow, ("bf16", "tf32"))])
def test_outputs_that_meet_equal_numpy(precision, shape):
    task = task_of(precision=precision, **shape)
    assert mistake(task, 37) is None
    assert mistake(task, 70, knobs=MANY) is None


@pytest.mark.parametrize("shape", [GATED, TURNED], ids=["gated", "turned"])
def test_outputs_that_meet_by_wgmma_equal_numpy(shape):
    assert mistake(task_of(**shape), 70, knobs=BY_GROUPS) is None


@pytest.mark.parametrize("precision", ["int8", *map(slow, ("fp16", "int8_static"))])
@pytest.mark.parametrize("columns", [16, 48])  # half a row of bytes is no multiple of 16
def test_gated_networks_write_bytes_and_pad_with_zeros(columns, precision):
    task = task_of(**GATED, precision=precision, writes="to_int8")
    assert mistake(task, 18, knobs={"few": 192, "few_columns": columns}) is None


@pytest.mark.parametrize("rows", [191, 192, 768])
def test_dense_chooses_its_entry_by_the_number_of_rows(rows):
    assert mistake(task_of(64, 48), rows, knobs={"few": 192, "some": 768}) is None


@pytest.mark.parametrize(
    "precision, rows, columns",
    [
        ("fp16", 64, 192),
        ("fp16", 256, 96),
        ("int8", 128, 256),
        *itertools.starmap(slow, [("fp16", 128, 256), ("int8", 64, 192), ("int8", 256, 96)]),
    ],
)
def test_dense_by_wgmma_equals_numpy(precision, rows, columns):
    task = task_of(200, 264, "gelu", True, precision)
    knobs = {**MANY, "many_tensor": 1, "many_rows": rows, "many_columns": columns}
    assert mistake(task, 150, knobs=knobs) is None


@pytest.mark.parametrize("tensor", [0, 1])
def test_dense_reads_no_bank_twice_and_no_sector_in_part(tensor):
    task, row = task_of(256, 256, "gelu", True), cuda_kernels.row_of("cuda-sm90")
    knobs = {**dense.default(task, row), **MANY, "many_tensor": tensor, "many_slices": 1}
    knobs |= {"many_rows": 128, "many_columns": 128}
    sample = row_sample(task, 256, np.random.default_rng(0))
    arrays = [*sample.activations, *dense.pack(task, knobs, sample.weights, row)]
    kernel = dense.kernel(task, knobs, row)
    moved, multiplied = emulator.count_traffic(kernel, [*arrays, *sample.buffers()], sample.symbols)
    assert all(traffic.parts == traffic.least for traffic in moved.values()), moved
    assert multiplied == 256**3
    panels = 4 * (128 + 128) * 256 * 2  # of four tiles
    assert moved["copy_async read"].bytes == panels + 256 * 256 * 2 + 4 * 128 * 4
    assert moved["global write"].bytes == 256 * 256 * 2


def test_entries_share_the_rows_between_them():
    task, row = task_of(), cuda_kernels.row_of("cuda-sm90")
    for few, some in ((192, 768), (768, 768), (0, 768), (384, 0), (0, 0)):
        knobs = {**dense.default(task, row), "few": few, "some": some}
        launches = dense.kernel(task, knobs, row).launches
        for rows in (1, 191, 192, 383, 384, 767, 768, 4096):
            assert [evaluate(launch.when, {"rows": rows}) for launch in launches].count(1) == 1


@pytest.mark.parametrize(
    "precision, row", [("fp16", "cuda-sm75"), ("int8", "cuda-sm75"), slow("fp16", "cuda-sm86")]
)
def test_dense_of_other_rows_equals_numpy(precision, row):
    assert mistake(task_of(200, 136, precision=precision), 70, row) is None


@pytest.mark.parametrize("seed", range(4))
def test_dense_equals_numpy_for_any_knobs(seed):
    check_a_point(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 200))
def test_dense_equals_numpy_for_many_knobs(seed):
    check_a_point(seed)


def check_a_point(seed):
    """A kernel drawn by the seed: shape, precision, epilogue, target, knobs, rows, warp order."""
    rng = np.random.default_rng(seed)
    inputs, outputs = SHAPES[rng.integers(len(SHAPES))]
    precision = str(rng.choice(PRECISIONS))
    old = precision not in ("bf16", "tf32")
    row = str(rng.choice(cuda_kernels.ROWS if old else cuda_kernels.ROWS[1:]))
    activation = str(rng.choice(["none", "gelu", "relu"]))
    narrow = {"writes": "to_int8"} if rng.random() < 0.25 else {}
    residual, meeting = bool(rng.random() < 0.5), int(rng.integers(4))
    if meeting == 1 and outputs % 2 == 0:
        narrow, residual = {**narrow, "gated": True}, False
    elif meeting == 2 and outputs > 40:
        narrow, residual, activation = {"turned": 3, "head_size": 12}, False, "none"
    task = task_of(inputs, outputs, activation, residual, precision, **narrow)
    (knobs,) = cuda_kernels.points(task, row, 1, seed)
    rows = int(rng.choice([1, 16, 37, 130, 300]))
    assert mistake(task, rows, row, knobs, seed) is None, (task.name, row, knobs, rows)


@pytest.mark.parametrize("row", cuda_kernels.ROWS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_point_fits_the_gpu(precision, row):
    gpu = cuda_kernels.row_of(row).gpu
    for sizes in ((768, 3072), (3072, 768), (312, 1200), (33, 7)):
        task = task_of(*sizes, precision=precision, residual=True)
        for knobs in cuda_kernels.points(task, row, 15):
            for prefix in ("few_", "some_", "many_"):
                own = {key.removeprefix(prefix): value for key, value in knobs.items()}
                tile = Tile.of(task, own, gpu)
                assert tile.shared <= gpu.shared_per_block
                assert tile.threads <= 1024
                assert tile.registers * tile.threads <= gpu.registers_per_sm
                assert tile.tall * tile.wide % tile.slices == 0
                assert tile.rows % (16 * tile.tall) == 0
                assert tile.columns % (8 * tile.wide) == 0
                assert tile.stages >= 2


def code_of(task, row):
    """What the machine code of each entry of the default takes, with its launch."""
    target = cuda_kernels.row_of(row)
    kernel = dense.kernel(task, dense.default(task, target), target)
    code = compiler.find().run(compiler.prelude() + kernel.source, compiler.machine(target))
    taken = cubin.read(code)
    return [(taken[launch.entry], launch) for launch in kernel.launches]


def assert_fits(task, row):
    gpu = cuda_kernels.row_of(row).gpu
    for taken, launch in code_of(task, row):
        assert taken.local == 0, launch.entry
        assert taken.registers * launch.threads <= gpu.registers_per_sm
        assert taken.shared + launch.shared <= gpu.shared_per_block
        if task.shape["precision"] != "fp32":
            assert taken.tensor, launch.entry


@pytest.mark.parametrize("row", ["cuda-sm75", "cuda-sm90"])
def test_code_of_the_default_spills_nothing(row):
    assert_fits(task_of(768, 3072, "gelu"), row)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("row", cuda_kernels.ROWS)
def test_code_of_outputs_that_meet_spills_nothing(row, precision):
    if row == "cuda-sm75" and precision in ("bf16", "tf32"):
        pytest.skip(f"{row} has no {precision}")
    assert_fits(task_of(768, 2304, "gelu", precision=precision, gated=True), row)
    assert_fits(task_of(768, 2304, precision=precision, turned=24, head_size=64), row)


def test_code_for_newer_gpus_has_no_wgmma():
    task, row = task_of(768, 768, residual=True), cuda_kernels.row_of("cuda-sm90")
    kernel = dense.kernel(task, dense.default(task, row), row)
    ptx = compiler.find().run(compiler.prelude() + kernel.source, compiler.virtual(row)).decode()
    assert "wgmma" in kernel.source and "wgmma" not in ptx
    assert all(f".entry {launch.entry}" in ptx for launch in kernel.launches)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(768, 2304), (768, 768), (3072, 768), (384, 1536)])
@pytest.mark.parametrize(
    "row, precision",
    [
        (row, precision)
        for row in cuda_kernels.ROWS
        for precision in PRECISIONS
        if row != "cuda-sm75" or precision not in ("bf16", "tf32")
    ],
)
def test_code_of_any_default_spills_nothing(row, precision, sizes):
    assert_fits(task_of(*sizes, "gelu", sizes[0] == sizes[1], precision), row)
