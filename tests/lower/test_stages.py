"""A graph with early heads is cut where they are: each layer lies in one stage, and states alone go
from one to the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from bertile.backends.cpu.lowering import lower
from bertile.base.errors import ModelError
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.lower import stages
from bertile.onnx.exported import ExportedModel
from bertile.schedules.cpu import SCHEDULES
from bertile.targets.rows import resolve

ROW = resolve("x86-avx512", threads=1)
WEIGHTS = {"w1": (8, 8), "w2": (8, 8), "head1": (8, 2), "head2": (8, 2), "b8": (8,), "b2": (2,)}


def graph_of(build) -> Graph:
    """``build(emit, x (B, S, 8), named weights)`` gives the logits, and those of the early head."""
    batch, length, blocks = (tvm.tirx.Var(name, "int64") for name in ("batch", "length", "m"))
    x = relax.Var("x", relax.TensorType([batch, length, 8], "float32"))
    table = relax.Var(TABLE, relax.TensorType([blocks, 4], "int32"))
    values = {name: np.ones(shape, "float32") for name, shape in WEIGHTS.items()}
    named = {n: relax.Var(n, relax.TensorType(shape, "float32")) for n, shape in WEIGHTS.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", [x, table, *named.values()], attrs={"num_input": 2}):
        with builder.dataflow():
            results = relax.Tuple(build(lambda e: builder.emit(builder.normalize(e)), x, named))
            result = builder.emit_output(results)
        builder.emit_func_output(result)
    exported = ExportedModel(
        *(Path(), "m", "0", "bert", "sequence-classification", None, ()),
        outputs=("logits", "exits.1"),
        exits=(1, 2),
    )
    return Graph(builder.finalize(), values, exported)


def two_layers(emit, x, w):
    first = emit(ops.dense(x, w["w1"], w["b8"]))
    second = emit(ops.dense(first, w["w2"], w["b8"]))
    logits = emit(ops.dense(emit(ops.first_token(second)), w["head2"], w["b2"]))
    return [logits, emit(ops.dense(emit(ops.first_token(first)), w["head1"], w["b2"]))]


def calls(main) -> list[str]:
    """The weights that the operators of a function multiply with, in their order."""
    bindings = [b.value for block in main.body.blocks for b in block.bindings]
    return [value.args[1].name for value in bindings if ops.is_call(value, "bertile.dense")]


def test_every_layer_lies_in_one_stage():
    early, last = stages.cut(graph_of(two_layers))
    assert calls(early.graph.main) == ["w1", "head1"] and calls(last.graph.main) == ["w2", "head2"]
    assert (early.states, early.gives) == ((), 1) and (len(last.states), last.gives) == (1, 0)
    assert last.states[0].same_as(early.graph.main.body.body.fields[0])


def test_a_model_without_early_heads_is_not_cut():
    graph = graph_of(two_layers)
    plain = ExportedModel(*(Path(), "m", "0", "bert", "encoder", None, ()), outputs=("logits",))
    assert stages.cut(Graph(graph.mod, graph.params, plain)) == []


def test_a_later_layer_that_reads_more_than_states_is_refused():
    def build(emit, x, w):
        first = emit(ops.first_token(emit(ops.dense(x, w["w1"], w["b8"]))))
        return [emit(ops.dense(first, w[name], w["b2"])) for name in ("head2", "head1")]

    with pytest.raises(ModelError, match="cannot be cut behind layer 1"):
        stages.cut(graph_of(build))


def test_functions_share_kernels_and_take_the_weights_that_they_read():
    graph = graph_of(two_layers)
    choose = lambda task: SCHEDULES[task.operation].default(task, ROW)  # noqa: E731
    lowered = lower(graph, ROW, choose, stages.cut(graph))
    alone = lower(graph, ROW, choose)
    assert lowered.params.keys() == alone.params.keys() and lowered.tasks == alone.tasks
    read = [{name.partition("@")[0] for name in stage.weights} for stage in lowered.stages]
    assert read == [{"w1", "head1", "b8", "b2"}, {"w2", "head2", "b8", "b2"}]
    assert [stage.states for stage in lowered.stages] == [0, 1]
    kernels = {v.name_hint for v, f in lowered.mod.functions.items() if not hasattr(f, "ret_ty")}
    assert len([name for name in kernels if name.startswith("dense_8_8")]) == 1
    relax.analysis.well_formed(lowered.mod)  # raises, were a variable in two functions
