"""Operators that are not ours: TVM's kernels for them, run on the emulator, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from bertile.backends.cuda import generic
from bertile.codegen.cuda import compiler
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
    "infinite": (lambda ids, x: relax.op.isinf(x), lambda ids, x: np.isinf(x)),
    "infinity": (
        lambda ids, x: relax.op.minimum(x, relax.const(-np.inf)),
        lambda ids, x: np.full_like(x, -np.inf),
    ),
    "no number": (
        lambda ids, x: relax.op.add(x, relax.const(np.nan, "float32")),
        lambda ids, x: np.full_like(x, np.nan),
    ),
    "infinity of 64 bits": (
        lambda ids, x: relax.op.add(double(x), relax.const(np.inf, "float64")),
        lambda ids, x: np.full(x.shape, np.inf),
    ),
    "no number of 64 bits": (
        lambda ids, x: relax.op.add(double(x), relax.const(np.nan, "float64")),
        lambda ids, x: np.full(x.shape, np.nan),
    ),
}


def constant_one():
    return relax.const(1, "int64")


def double(x):
    return relax.op.astype(x, "float64")


# Of numbers that C has no words for one of each width: the others take the same way.
REST = ("no number", "infinity of 64 bits")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in REST else []) for name in CASES],
)
def test_loops_of_tvm_compute_what_numpy_computes(name, tmp_path):
    make, reference = CASES[name]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (2, 21))
    x = rng.standard_normal((2, 21, 6)).astype("float32")
    result, _ = emulated(graph(make), (ids, x), tmp_path)
    np.testing.assert_allclose(result, reference(ids, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    ["int64", "uint8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int32", "int8"))],
)
def test_a_cast_of_onnx_to_integers_compiles_and_cuts_as_numpy_does(kind, tmp_path):
    onnx = pytest.importorskip("onnx")
    from tvm.relax.frontend.onnx import from_onnx

    to = getattr(onnx.TensorProto, kind.upper())
    node = onnx.helper.make_node("Cast", ["x"], ["y"], to=to)
    spec = onnx.helper.make_tensor_value_info
    floats = spec("x", onnx.TensorProto.FLOAT, ["batch", "length"])
    whole = onnx.helper.make_graph([node], "cast", [floats], [spec("y", to, ["batch", "length"])])
    x = np.random.default_rng(0).uniform(-100, 100, (3, 7)).astype("float32")
    x = np.abs(x) if kind == "uint8" else x
    x[0, :3] = np.nan, np.inf, -np.inf
    result, sources = emulated(from_onnx(onnx.helper.make_model(whole)), (x,), tmp_path)
    np.testing.assert_array_equal(result, np.where(np.isfinite(x), x, 0).astype(kind))
    tool = compiler.find()
    for source in sources:  # by what compiles bundles, which includes no header
        assert tool.run(compiler.prelude() + source, compiler.machine(resolve("cuda-sm80")))


def emulated(mod, inputs, directory):
    """What main gives on the emulator, and the text of its kernels."""
    row = resolve("cuda-sm80")
    symbols = dict(zip(("batch", "length"), inputs[0].shape)) | {"blocks": 0}
    mod = generic.scheduled(mod, row)
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    calls = [b for b in bindings if isinstance(b.value, tvm.ir.Call)]
    assert all(str(b.value.op.name) == "relax.call_tir" for b in calls)
    values, sources = dict(zip(mod["main"].params, inputs)), []
    for number, binding in enumerate(calls):
        call = binding.value
        loops = generic.loops(f"loops_{number}", mod[call.args[0]], row)
        assert "#include" not in loops.source
        operands = [
            field.value.numpy() if isinstance(field, tvm.ir.GenericConst) else values[field]
            for field in call.args[1].fields
        ]
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
        kernels = emulator.Emulated(emulator.build(loops.source, directory))
        for step in steps:
            places = {"operand": arrays, "scratch": scratch}
            arguments = [
                places[kind][value] if kind in places else np.dtype(kind).type(value)
                for kind, value in step.arguments
            ]
            kernels.launch(step.entry, step.grid, step.threads, 0, arguments)
        values[binding.var] = arrays[-1]
        sources.append(loops.source)
    return arrays[-1], sources


def _placed(array):
    place = emulator.aligned(array.shape, array.dtype)
    place[...] = array
    return place


def _number(expr, main, symbols):
    """An extent of main's as a number."""
    names = {var: symbols[var.name] for var in main.params[0].ty.shape if hasattr(var, "name")}
    return names.get(expr, expr)
