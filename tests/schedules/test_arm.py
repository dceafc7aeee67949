"""Kernels of the ARM rows, as qemu runs them, against numpy: every operation on odd shapes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.attention_variants import VARIANTS
from helpers.emulated import Emulated, need_qemu

from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu import SCHEDULES, arithmetic, lanes, peak, precisions
from bertile.schedules.task import Task
from bertile.targets import rows


def product(inputs, outputs, activation="none", residual=False, **more):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    return Task("sparse" if "density" in more else "dense", {**shape, **more})


def attention(heads, size, variant="all", **more):
    shape = VARIANTS[variant].spec(heads, size, bias=True, scale=0.2).shape()
    return Task("attention", {**shape, **more})


def normalized(operation, channels, **more):
    ids = {"ids": "int64_int32", "rows": "50_2"} if operation == "embedding" else {}
    return Task(operation, {"channels": channels, "epsilon": 1e-5, **ids, **more})


# A task, and on how many blocks of 16 tokens.
FP32 = [
    (product(70, 38), 3),
    (product(37, 19, "gelu", residual=True), 5),
    (product(256, 12, "gelu_tanh"), 2),
    (product(13, 7, "tanh", precision="fp16"), 1),
    (product(13, 17, precision="fp16"), 2),
    (product(1, 5, "relu", residual=True), 2),
    (product(70, 38, "gelu", residual=True, density=20), 3),
    (product(37, 26, "gelu", gated=True), 3),
    (product(37, 33, turned=2, head_size=10), 3),
    (attention(2, 24), 4),
    (attention(1, 7), 1),
    (attention(1, 12, writes="to_int8"), 2),
    *((attention(2, 12, variant), 4) for variant in VARIANTS if variant != "all"),
    (normalized("layer_norm", 70), 3),
    (normalized("layer_norm", 31, kind="int8"), 2),
    (normalized("embedding", 26), 2),
    (normalized("embedding", 26, precision="fp16", kind="int8_static"), 2),
    (Task("rotary", {"channels": 30, "heads": 2, "head_size": 10}), 3),
    (Task("narrow", {"channels": 26, "kind": "int8", "smooth": True}), 3),
    (Task("narrow", {"channels": 26, "kind": "int8_static"}), 2),
    *((Task(name, {"channels": 26}), 3) for name in ("tokens_in", "tokens_out", "first_token")),
    *((Task(name, {"channels": 26}), 3) for name in ("rows_in", "rows_out")),
    (Task("key_mask"), 3),
    (Task("query_bias"), 3),
    (normalized("layer_norm", 31, rms=True), 3),
    (Task("rotary", {"channels": 30, "heads": 2, "head_size": 10, "epsilon": 1e-6}), 3),
    (attention(2, 12, softcap=2.0), 3),
]
INT8 = [
    (product(64, 12, precision="int8_static"), 1),
    (product(70, 38, precision="int8"), 3),
    (product(37, 19, "gelu", residual=True, precision="int8"), 5),
    (product(13, 17, precision="int8_static"), 2),
    (product(1, 5, "relu", precision="int8"), 1),
    (product(96, 44, "gelu", precision="int8_static", writes="to_int8"), 3),
    (product(52, 44, residual=True, precision="int8", writes="to_int8"), 2),
    (product(80, 38, "gelu", residual=True, density=30, precision="int8"), 3),
    (product(37, 20, density=50, precision="int8_static", writes="to_int8"), 2),
    (product(70, 38, "gelu", residual=True, precision="int4", group=32), 3),
    (product(200, 44, precision="int4", group=64, writes="to_int8"), 2),
    (product(37, 24, "gelu", gated=True, precision="int8_static", writes="to_int8"), 3),
    (product(37, 30, turned=2, head_size=10, precision="int8"), 3),
]
BF16 = [
    (product(64, 12, precision="bf16"), 1),
    (product(70, 38, precision="bf16"), 3),
    (product(37, 19, "gelu", residual=True, precision="bf16"), 5),
    (product(96, 44, "gelu", precision="bf16", writes="to_bf16"), 3),
    (product(52, 36, precision="bf16", writes="to_bf16", values_from=24), 5),
    (product(80, 38, "gelu", residual=True, density=30, precision="bf16"), 3),
    (product(37, 24, "silu", gated=True, precision="bf16", writes="to_bf16"), 3),
    (product(37, 36, turned=4, head_size=6, precision="bf16", writes="to_bf16", values_from=24), 3),
    (attention(2, 24, precision="bf16", writes="to_bf16"), 4),
    *((attention(2, 12, v, precision="bf16", writes="to_bf16"), 4) for v in VARIANTS if v != "all"),
    (normalized("layer_norm", 31, kind="bf16"), 2),
]
TASKS = {
    "arm-a72": [*FP32, *INT8],
    "arm-a76": [*FP32[:2], *INT8],
    "arm-v1": [*FP32[:7], *INT8, *BF16],
    "arm-v2": [*FP32[:2], *INT8[:3], INT8[-2], *BF16[:3]],
}
# Whose instructions arm-v1 has too.
LATE = {"arm-v2": pytest.mark.slow}
CALLS = [
    pytest.param(name, place, id=f"{name}-{task.name}", marks=LATE.get(name, ()))
    for name, tasks in TASKS.items()
    for place, (task, _) in enumerate(tasks)
]


# Weights of both signs at their limits, and x at its limits or anywhere.
def integers(row, operation):
    """A call whose sums are whole numbers below 2**24, and what it must give."""
    shape = {"density": 100} if operation == "sparse" else {}
    task = product(60, 8, precision="int8_static", **shape)
    schedule, rng = SCHEDULES[operation], np.random.default_rng(0)
    knobs = schedule.default(task, row)
    w = rng.integers(-128, 128, (60, 8)).astype("int8")
    w[:, :3] = -128, -127, 127
    x = rng.integers(0, 256, (3 * BLOCK_TOKENS, 60)).astype("uint8")
    x[0], x[1], x[2] = 0, 255, 128
    vectors = [np.ones(8, "float32"), np.zeros(8, "float32")]
    operands = [arithmetic.grouped(x, 4), *schedule.pack(task, knobs, [w, *vectors], row)]
    expected = lanes.to_lanes((x.astype("int64") @ w.astype("int64")).astype("float32"))
    return schedule.kernel(task, knobs, row), operands, expected


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What is wrong with each call of a row, by the row's name, and whether the sums of integers
    are what they must be, by the operation; each row is run once.
    """
    by_row = {}

    def of(name):
        if name not in by_row:
            emulated = Emulated(rows.resolve(name, threads=1), tmp_path_factory.mktemp(name))
            samples = [emulated.add(task, blocks)[1] for task, blocks in TASKS[name]]
            calls = {each: integers(emulated.row, each) for each in ("dense", "sparse")}
            for func, operands, expected in calls.values():
                emulated.add_func(func, operands, [np.zeros_like(expected)])
            results = emulated.run()
            mistakes = [sample.mistake(result) for sample, result in zip(samples, results)]
            exact = {
                operation: np.array_equal(sums, expected)
                for (operation, (*_, expected)), (sums,) in zip(
                    calls.items(), results[len(samples) :], strict=True
                )
            }
            by_row[name] = mistakes, exact
        return by_row[name]

    need_qemu()
    return of


@pytest.mark.parametrize(("name", "place"), CALLS)
def test_a_kernel_equals_numpy(outcomes, name, place):
    mistakes, _ = outcomes(name)
    assert mistakes[place] is None


@pytest.mark.parametrize("name", [pytest.param(name, marks=LATE.get(name, ())) for name in TASKS])
def test_sums_of_bytes_are_exact(outcomes, name):
    _, exact = outcomes(name)
    assert exact == {"dense": True, "sparse": True}


@pytest.mark.parametrize(
    ("name", "precision", "instruction"),
    [
        ("arm-a72", "fp32", "fmla"),
        ("arm-a72", "int8", "smull"),
        ("arm-a76", "int8", "sdot"),
        ("arm-v1", "fp32", "fmla"),
        ("arm-v1", "int8", "usmmla"),
        ("arm-v1", "bf16", "bfmmla"),
    ],
)
def test_inner_loop_multiplies_from_registers(kernels_of, name, precision, instruction):
    text = kernels_of(name).build(product(768, 768, precision=precision)).inspect_source("asm")
    blocks = re.split(r"\n\.L\w+:", text)
    busiest = max(blocks, key=lambda block: len(re.findall(rf"\s{instruction}\s", block)))
    lines = [line.split()[0] for line in busiest.splitlines() if line.startswith("\t")]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("b."))]
    multiplied = lines.count(instruction)
    assert multiplied >= 64
    assert sum(line.startswith("st") for line in lines) <= multiplied // 24, "spilled"
    assert sum(line.startswith("ld") for line in lines) <= multiplied // 3
    assert lines.count("ld1r") <= multiplied // 24, "broadcast one by one"


@pytest.mark.parametrize(
    ("precision", "instruction"), [("fp32", "fmla"), ("int8", "usmmla"), ("bf16", "bfmmla")]
)
def test_peak_is_of_the_instruction_that_kernels_use(kernels_of, precision, instruction):
    kernels = kernels_of("arm-v1")
    func = peak._multiply_adds(precisions.arithmetic(precision, kernels.row), 6, 1)
    asm = kernels.compile(func).inspect_source("asm")
    assert len(re.findall(rf"\s{instruction}\s", asm)) >= 24


def test_every_operation_is_tested_here():
    assert {task.operation for task, _ in FP32} == set(SCHEDULES)
