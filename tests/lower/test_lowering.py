"""From fused operators to kernel calls: layouts, shared masks, packed weights, names."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from bertile.backends.cpu.lowering import lower
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.graph.rewriting.dataflow import normalized
from bertile.lower.forms import Forms
from bertile.lower.lowering import tasks
from bertile.schedules.attention_spec import AttentionSpec
from bertile.schedules.cpu import SCHEDULES
from bertile.schedules.cpu.generic import is_kernel
from bertile.schedules.task import Task
from bertile.targets.rows import resolve

ROW = resolve("x86-avx512", threads=1)
WEIGHTS = {
    "w": (8, 8),
    "b": (8,),
    "wide": (8, 24),
    "wb": (24,),
    "words": (100, 8),
    "places": (64, 8),
}


def graph_of(build) -> Graph:
    """``build(emit, named)``: ids, x (B, S, 8), mask (B, 1, 1, S), bias (1, 2, S, S), weights."""
    batch, length, blocks = (tvm.tirx.Var(name, "int64") for name in ("batch", "length", "m"))
    values = {n: np.ones(shape, "float32") * i for i, (n, shape) in enumerate(WEIGHTS.items())}
    shapes = {
        "ids": [batch, length],
        "x": [batch, length, 8],
        "rows": [batch, 8],
        "mask": [batch, 1, 1, length],
        "bias": [1, 2, length, length],
        "angles": [1, length, 4],
    }
    dtypes = {"ids": "int64"}
    named = {
        n: relax.Var(n, relax.TensorType(shape, dtypes.get(n, "float32")))
        for n, shape in [*shapes.items(), *WEIGHTS.items()]
    }
    table = relax.Var(TABLE, relax.TensorType([blocks, 4], "int32"))
    inputs = [named[n] for n in shapes]
    params = [*inputs, table, *(named[n] for n in WEIGHTS)]
    builder = relax.BlockBuilder()
    with builder.function("main", params, attrs={"num_input": len(inputs) + 1}):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(build(builder.emit, named)))
        builder.emit_func_output(result)
    graph = Graph(builder.finalize(), values, None)
    return graph.with_main(normalized(graph.main))


def lowered(build):
    return lower(graph_of(build), ROW, lambda task: SCHEDULES[task.operation].default(task, ROW))


def attention(n, qkv, bias=None, scale=0.5):
    spec = AttentionSpec(2, 2, 4, scale, bias="none" if bias is None else "tensor")
    return ops.attention(spec, qkv, n["mask"], *([] if bias is None else [bias]))


def qkv(n):
    return ops.dense(n["x"], n["wide"], n["wb"])


def task_of_last(build) -> Task:
    graph = graph_of(build)
    return Forms(graph).task(graph.main.body.blocks[0].bindings[-1].var)


CALLS = {
    "dense_8_24": lambda emit, n: qkv(n),
    "dense_8_8_gelu": lambda emit, n: ops.dense(n["x"], n["w"], n["b"], activation="gelu"),
    "dense_8_8_residual": lambda emit, n: ops.dense(n["x"], n["w"], n["b"], n["x"]),
    "attention_2_4_0p5": lambda emit, n: attention(n, emit(qkv(n))),
    "attention_2_4_0p5_bias": lambda emit, n: attention(n, emit(qkv(n)), n["bias"]),
    "rotary_24_4_4": lambda emit, n: ops.rotary(emit(qkv(n)), n["angles"], n["angles"], heads=4),
    "layer_norm_8_1em12": lambda emit, n: ops.layer_norm(n["x"], n["b"], n["b"], 1e-12),
    "embedding_8_1em05_int64_int64_100_64": lambda emit, n: ops.embedding(
        [n["ids"], n["ids"]], [n["words"], n["places"]], (n["b"], n["b"]), 1e-5
    ),
    "first_token_8": lambda emit, n: ops.first_token(n["x"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_task_says_what_the_operator_computes(name):
    task = task_of_last(CALLS[name])
    assert task.name == name
    assert task.operation in SCHEDULES


def test_angles_come_into_lanes_once_for_all_layers():
    def build(emit, n):
        x = emit(ops.rotary(emit(qkv(n)), n["angles"], n["angles"], heads=4))
        return ops.rotary(x, n["angles"], n["angles"], heads=4)

    assert {task.name: count for task, count in lowered(build).tasks.items()} == {
        "tokens_in_8": 1,
        "tokens_in_4": 1,
        "tokens_out_24": 1,
        "dense_8_24": 1,
        "rotary_24_4_4": 2,
    }


def test_task_ignores_how_an_exporter_rounds():
    exact = task_of_last(lambda emit, n: attention(n, emit(qkv(n)), scale=0.5))
    rounded = task_of_last(
        lambda emit, n: attention(n, emit(qkv(n)), scale=float(0.25**0.5 + 1e-8))
    )
    assert exact == rounded
    epsilon = float(np.float32(1e-12))
    norm = task_of_last(lambda emit, n: ops.layer_norm(n["x"], n["b"], n["b"], epsilon))
    assert norm.shape["epsilon"] == 1e-12


def test_tasks_counts_calls_before_lowering():
    def build(emit, n):
        y = emit(ops.dense(n["x"], n["w"], n["b"]))
        return ops.layer_norm(emit(ops.dense(y, n["w"], n["b"])), n["b"], n["b"], 1e-12)

    assert {task.name: count for task, count in tasks(Forms(graph_of(build))).items()} == {
        "dense_8_8": 2,
        "layer_norm_8_1em12": 1,
    }


def counts(program):
    return {task.name: count for task, count in program.tasks.items()}


def test_layout_changes_only_where_tokens_come_in_and_go_out():
    def build(emit, n):
        y = emit(ops.dense(n["x"], n["w"], n["b"]))
        z = emit(ops.layer_norm(y, n["b"], n["b"], 1e-12))
        return ops.dense(z, n["w"], n["b"], y)

    calls = counts(lowered(build))
    assert calls["tokens_in_8"] == calls["tokens_out_8"] == 1
    assert sum(calls.values()) == 5


def test_operator_in_between_reads_and_writes_rows():
    def build(emit, n):
        y = emit(ops.dense(n["x"], n["w"], n["b"]))
        return ops.dense(emit(op.nn.silu(y)), n["w"], n["b"])

    program = lowered(build)
    assert counts(program)["tokens_in_8"] == counts(program)["tokens_out_8"] == 2
    assert [name.split(" (")[0] for name in program.fallthrough] == ["nn.silu"]


def test_everything_matched_falls_through_nowhere():
    assert lowered(CALLS["dense_8_24"]).fallthrough == []


def test_rows_of_a_matrix_have_a_layout_of_their_own():
    program = lowered(lambda emit, n: ops.dense(n["rows"], n["w"], n["b"]))
    assert counts(program) == {"rows_in_8": 1, "dense_8_8": 1, "rows_out_8": 1}


def test_mask_and_bias_change_layout_once_for_all_layers():
    def build(emit, n):
        first = emit(attention(n, emit(qkv(n)), n["bias"]))
        second = emit(ops.dense(first, n["wide"], n["wb"]))
        return attention(n, second, n["bias"])

    calls = counts(lowered(build))
    assert calls["key_mask"] == calls["query_bias"] == 1
    assert calls["attention_2_4_0p5_bias"] == 2


def test_weights_are_packed_once_for_equal_kernels():
    def build(emit, n):
        return ops.dense(emit(ops.dense(n["x"], n["w"], n["b"])), n["w"], n["b"])

    program = lowered(build)
    assert list(program.params) == ["w@dense_8_8", "b@dense_8_8"]
    assert [p.name for p in program.mod["main"].params[7:]] == list(program.params)
    for param in program.mod["main"].params[7:]:
        assert tuple(int(e) for e in param.ty.shape) == program.params[param.name].shape


def test_weight_that_a_generic_operator_reads_stays_as_it_is():
    def build(emit, n):
        y = emit(ops.dense(n["x"], n["w"], n["b"]))
        return op.add(y, op.tanh(n["b"]))

    assert {"b", "b@dense_8_8"} < set(lowered(build).params)


def test_weight_in_its_own_layout_is_not_copied():
    graph = graph_of(CALLS["layer_norm_8_1em12"])
    program = lower(graph, ROW, lambda task: SCHEDULES[task.operation].default(task, ROW))
    assert program.params["b"] is graph.params["b"]


def test_constants_of_one_call_get_names_of_their_own():
    gamma, beta = (relax.const(np.full(8, value, "float32")) for value in (2.0, 3.0))
    program = lowered(lambda emit, n: ops.layer_norm(n["x"], gamma, beta, 1e-12))
    assert [value[0] for value in program.params.values()] == [2.0, 3.0]


def test_knobs_come_from_the_caller():
    asked = []

    def choose(task):
        asked.append(task.name)
        return SCHEDULES[task.operation].default(task, ROW)

    lower(graph_of(CALLS["attention_2_4_0p5"]), ROW, choose)
    assert set(asked) == {
        "tokens_in_8",
        "dense_8_24",
        "key_mask",
        "attention_2_4_0p5",
        "tokens_out_8",
    }


def test_every_kernel_is_marked_as_ours():
    mod = lowered(CALLS["attention_2_4_0p5"]).mod
    functions = [f for f in mod.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(functions) == 5 and all(map(is_kernel, functions))


def test_result_is_always_a_tuple():
    of_one = lowered(CALLS["dense_8_24"]).mod["main"]
    assert isinstance(of_one.ret_ty, relax.TupleType) and len(of_one.ret_ty.fields) == 1
    of_two = lowered(
        lambda emit, n: relax.Tuple([emit(qkv(n)), emit(ops.first_token(n["x"]))])
    ).mod["main"]
    assert [len(t.shape) for t in of_two.ret_ty.fields] == [3, 2]


def test_lowered_module_is_well_formed():
    for build in CALLS.values():
        relax.analysis.well_formed(lowered(build).mod)  # raises where it is not
