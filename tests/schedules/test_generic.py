"""Operators that no schedule covers: parallel and vectorized, and still right."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx

from bertile.backends.cpu.builder import fuse_and_schedule
from bertile.schedules.cpu.dense import dense
from bertile.schedules.cpu.generic import KERNEL, is_kernel, schedule_generic
from bertile.schedules.task import Task


def module_of(expression, *inputs):
    """``expression`` of inputs given as (shape, dtype), legalized, fused and scheduled."""
    builder = relax.BlockBuilder()
    params = [
        relax.Var(f"x{i}", relax.TensorType(shape, dtype))
        for i, (shape, dtype) in enumerate(inputs)
    ]
    with builder.function("main", params, attrs={"num_input": len(params)}):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(expression(*params)))
        builder.emit_func_output(result)
    return builder.finalize()


def scheduled(expression, *inputs):
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    return fuse_and_schedule(module_of(expression, *inputs), target)


def kinds_of(func):
    """The kinds of all loops of a PrimFunc: parallel, vectorized, serial."""
    kinds = []
    tvm_ffi.structural_walk(
        func.body, (tirx.For, lambda loop: kinds.append(tirx.ForKind(loop.kind).name))
    )
    return kinds


def the_func(mod):
    (func,) = (f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc))
    return func


def run(mod, *arrays):
    library = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "num-cores": 1}))
    machine = relax.VirtualMachine(library, tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


M = tirx.Var("m", "int64")
FLOATS = ([M, 48], "float32")


def test_a_sum_over_no_rows_is_zero():
    def of_later_rows(x):
        return relax.op.sum(relax.op.strided_slice(x, [0], [1], [M]), axis=0)

    mod = scheduled(of_later_rows, FLOATS)
    library = tvm.compile(mod, target=tvm.target.Target({"kind": "llvm", "num-cores": 1}))
    main = relax.VirtualMachine(library, tvm.cpu())["main"]
    for rows in (9, 1, 2):  # what the first leaves in memory is no zero
        x = random(rows, 48)
        assert np.abs(main(tvm.runtime.tensor(x)).numpy() - x[1:].sum(0)).max() < 1e-5


def test_elementwise_operators_are_fused_parallel_and_vectorized():
    mod = scheduled(lambda x: relax.op.add(relax.op.nn.silu(x), x), FLOATS)
    assert sorted(kinds_of(the_func(mod))) == ["PARALLEL", "VECTORIZED"]
    x = random(5, 48)
    assert np.abs(run(mod, x) - (x / (1 + np.exp(-x)) + x)).max() < 1e-6


def test_reduction_is_parallel_outside_and_serial_inside():
    mod = scheduled(lambda x: relax.op.sum(x, axis=1), FLOATS)
    assert "PARALLEL" in kinds_of(the_func(mod))
    x = random(5, 48)
    assert np.abs(run(mod, x) - x.sum(1)).max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_is_right_over_each_axis(axis):
    mod = scheduled(lambda x: relax.op.nn.softmax(x, axis=axis), FLOATS)
    assert "PARALLEL" in kinds_of(the_func(mod))
    x = random(5, 48)
    e = np.exp(x - x.max(axis, keepdims=True))
    assert np.abs(run(mod, x) - e / e.sum(axis, keepdims=True)).max() < 1e-6


def test_matmul_is_parallel_with_vectors_innermost():
    mod = scheduled(relax.op.matmul, FLOATS, ([48, 32], "float32"))
    assert {"PARALLEL", "VECTORIZED"} <= set(kinds_of(the_func(mod)))
    x, w = random(5, 48), random(48, 32)
    assert np.abs(run(mod, x, w) - x @ w).max() < 1e-4


def test_odd_extent_stays_whole():
    mod = scheduled(relax.op.tanh, ([M, 13], "float32"))
    assert kinds_of(the_func(mod)) == ["PARALLEL"]
    x = random(7, 13)
    assert np.abs(run(mod, x) - np.tanh(x)).max() < 1e-6


def test_scalar_needs_no_loop():
    mod = scheduled(relax.op.exp, ([], "float32"))
    assert kinds_of(the_func(mod)) == []
    assert run(mod, np.float32(1).reshape(())) == pytest.approx(np.e)


def test_sum_of_everything_is_right():
    mod = scheduled(lambda x: relax.op.sum(x), FLOATS)
    assert np.abs(run(mod, random(5, 48)) - random(5, 48).sum()) < 1e-4


def test_lookup_by_integers_is_parallel():
    mod = scheduled(
        lambda table, ids: relax.op.take(table, ids, axis=0, mode="clip"),
        ([10, 32], "float32"),
        ([M], "int64"),
    )
    assert {"PARALLEL", "VECTORIZED"} <= set(kinds_of(the_func(mod)))
    table, ids = random(10, 32), np.array([3, 0, 9, 3])
    assert np.array_equal(run(mod, table, ids), table[ids])


def test_running_sum_keeps_its_own_loops():
    mod = scheduled(lambda x: relax.op.cumsum(x, axis=1), ([M, 48], "int64"))
    assert kinds_of(the_func(mod)) == ["SERIAL", "PARALLEL"]
    x = np.arange(96).reshape(2, 48)
    assert np.array_equal(run(mod, x), x.cumsum(1))


def test_kernels_of_a_schedule_are_left_as_they_are(kernels):
    shape = {"inputs": 32, "outputs": 16, "activation": "none", "residual": False}
    task = Task("dense", shape)
    func = dense.kernel(task, dense.default(task, kernels.row), kernels.row)
    marked = func.with_attrs(KERNEL)
    assert is_kernel(marked) and not is_kernel(func)
    mod = tvm.IRModule({"dense": marked})
    tvm.ir.assert_structural_equal(schedule_generic(mod)["dense"], marked)
