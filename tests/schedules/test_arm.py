"""Kernels of the ARM rows, as qemu runs them, against numpy: every operation on odd shapes."""

from __future__ import annotations

import pytest
from emulated import Emulated, need_qemu

from bertile import targets
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.task import Task


def product(inputs, outputs, activation="none", residual=False, **more):
    shape = {"inputs": inputs, "outputs": outputs, "activation": activation, "residual": residual}
    return Task("sparse" if "density" in more else "dense", {**shape, **more})


def attention(heads, size, **more):
    return Task(
        "attention", {"heads": heads, "head_size": size, "scale": 0.2, "bias": True, **more}
    )


def normalized(operation, channels, **more):
    ids = {"ids": "int64_int32", "rows": "50_2"} if operation == "embedding" else {}
    return Task(operation, {"channels": channels, "epsilon": 1e-5, **ids, **more})


# A task, and on how many blocks of 16 tokens.
FP32 = [
    (product(70, 38), 3),
    (product(37, 19, "gelu", residual=True), 5),
    (product(256, 12, "gelu_tanh"), 2),
    (product(13, 7, "tanh", precision="fp16"), 1),
    (product(1, 5, "relu", residual=True), 2),
    (product(70, 38, "gelu", residual=True, density=20), 3),
    (attention(2, 24), 4),
    (attention(1, 7), 1),
    (attention(1, 12, writes="to_int8"), 2),
    (normalized("layer_norm", 70), 3),
    (normalized("layer_norm", 31, kind="int8"), 2),
    (normalized("embedding", 26), 2),
    (normalized("embedding", 26, precision="fp16", kind="int8_static"), 2),
    (Task("narrow", {"channels": 26, "kind": "int8", "smooth": True}), 3),
    (Task("narrow", {"channels": 26, "kind": "int8_static"}), 2),
    *((Task(name, {"channels": 26}), 3) for name in ("tokens_in", "tokens_out", "first_token")),
    *((Task(name, {"channels": 26}), 3) for name in ("rows_in", "rows_out")),
    (Task("key_mask"), 3),
    (Task("query_bias"), 3),
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
]
BF16 = [
    (product(64, 12, precision="bf16"), 1),
    (product(70, 38, precision="bf16"), 3),
    (product(37, 19, "gelu", residual=True, precision="bf16"), 5),
    (product(96, 44, "gelu", precision="bf16", writes="to_bf16"), 3),
    (product(52, 36, precision="bf16", writes="to_bf16", values_from=24), 5),
    (product(80, 38, "gelu", residual=True, density=30, precision="bf16"), 3),
    (attention(2, 24, precision="bf16", writes="to_bf16"), 4),
    (normalized("layer_norm", 31, kind="bf16"), 2),
]
TASKS = {
    "arm-a72": [*FP32, *INT8],
    "arm-a76": [*FP32[:2], *INT8],
    "arm-v1": [*FP32[:7], *INT8, *BF16],
    "arm-v2": [*FP32[:2], *INT8[:3], *BF16[:3]],
}
CALLS = [
    pytest.param(name, place, id=f"{name}-{task.name}")
    for name, tasks in TASKS.items()
    for place, (task, _) in enumerate(tasks)
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """What is wrong with each call of a row, by the row's name; each row is run once."""
    found = {}

    def of(name):
        if name not in found:
            emulated = Emulated(targets.resolve(name, threads=1), tmp_path_factory.mktemp(name))
            samples = [emulated.add(task, blocks)[1] for task, blocks in TASKS[name]]
            results = emulated.run()
            found[name] = [one.mistake(result) for one, result in zip(samples, results)]
        return found[name]

    need_qemu()
    return of


@pytest.mark.parametrize(("name", "place"), CALLS)
def test_a_kernel_equals_numpy(mistakes, name, place):
    assert mistakes(name)[place] is None


def test_every_operation_is_tested_here():
    assert {task.operation for task, _ in FP32} == set(SCHEDULES)
