"""Operators that are not ours: TVM's kernels for them, run on the emulator, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.backends.cuda import generic
from bertile.cuda_loader import evaluate
from bertile.run.cuda import emulator
from bertile.targets.rows import resolve

tvm = pytest.importorskip("tvm")
from tvm import relax  # noqa: E402


def graph(make):
    """main(ids (batch, length) int64, x (batch, length, 6)) → what ``make`` emits."""
    batch, length = (tvm.tirx.Var(name, "int64") for name in ("batch", "length"))
    ids = relax.Var("ids", relax.TensorType([batch, length], "int64"))
    x = relax.Var("x", relax.TensorType([batch, length, 6], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, x]):
        with builder.dataflow():
            out = builder.emit_output(make(ids, x))
        builder.emit_func_output(out)
    return builder.finalize()


CASES = {
    "compare": (
        lambda ids, x: relax.op.astype(
            relax.op.logical_not(relax.op.equal(ids, constant_one())), "int64"
        ),
        lambda ids, x: (ids != 1).astype("int64"),
    ),
    "softmax": (
        lambda ids, x: relax.op.nn.softmax(x, axis=-1),
        lambda ids, x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    ),
    "mean": (lambda ids, x: relax.op.mean(x, axis=1), lambda ids, x: x.mean(1)),
}


def constant_one():
    return relax.const(1, "int64")


@pytest.mark.parametrize("name", CASES)
def test_loops_of_tvm_compute_what_numpy_computes(name, tmp_path):
    make, reference = CASES[name]
    row, rng = resolve("cuda-sm80"), np.random.default_rng(0)
    ids = rng.integers(0, 3, (2, 21))
    x = rng.standard_normal((2, 21, 6)).astype("float32")
    symbols = {"batch": 2, "length": 21, "blocks": 0}
    mod = generic.scheduled(graph(make), row)
    calls = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    assert all(str(call.op.name) == "relax.call_tir" for call in calls)
    values = dict(zip(mod["main"].params, (ids, x)))
    for number, (block_binding, call) in enumerate(
        (b, b.value) for block in mod["main"].body.blocks for b in block.bindings
    ):
        loops = generic.loops(f"loops_{number}", mod[call.args[0]], row)
        assert "#include" not in loops.source
        operands = [values[field] for field in call.args[1].fields]
        wanted = [int(_number(e, mod["main"], symbols)) for e in call.ty.shape]
        result = np.zeros(wanted, str(call.ty.dtype))
        arrays = [_placed(array) for array in (*operands, result)]
        known = {
            e: size
            for param, array in zip(loops.func.params, arrays)
            for e, size in zip(param.ty.shape, array.shape)
            if isinstance(e, tvm.tirx.Var)
        }
        steps, sizes = loops.steps(known)
        scratch = [emulator.aligned(evaluate(size, symbols), np.uint8) for size in sizes]
        kernels = emulator.Emulated(emulator.build(loops.source, tmp_path))
        for step in steps:
            places = {"operand": arrays, "scratch": scratch}
            arguments = [
                places[kind][value] if kind in places else np.dtype(kind).type(value)
                for kind, value in step.arguments
            ]
            kernels.launch(step.entry, step.grid, step.threads, 0, arguments)
        values[block_binding.var] = arrays[-1]
    np.testing.assert_allclose(arrays[-1], reference(ids, x), rtol=1e-5, atol=1e-6)


def _placed(array):
    place = emulator.aligned(array.shape, array.dtype)
    place[...] = array
    return place


def _number(expr, main, symbols):
    """An extent of main's as a number."""
    names = {var: symbols[var.name] for var in main.params[0].ty.shape}
    return names.get(expr, expr)
