"""The plan of launches that a graph is lowered to, before anything is compiled."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tvm import relax

from bertile.backends.cuda import builder, plan, precision_plan
from bertile.backends.cuda.lowering import lower
from bertile.base.errors import BertileError, ModelError
from bertile.codegen.cuda import cubin
from bertile.graph import order
from bertile.graph.importer import import_onnx
from bertile.targets.rows import resolve
from bertile.tune.log import chooser
from bertile.tune.log.tuning_log import TuningLog


@pytest.fixture(scope="module")
def graph(exported):
    return order.optimize(import_onnx(exported))


def planned(graph, precision):
    row = resolve("cuda-sm80")
    choose = chooser.Chooser(TuningLog([], print), row, print)
    lowered = lower(
        precision_plan.plan_layers(graph, precision, row),
        row,
        lambda task: choose.choose(task).knobs,
    )
    return lowered, plan.write(graph, lowered, row)


def test_a_plan_names_what_is_there(graph):
    lowered, written = planned(graph, "fp16")
    content = written.content
    limits = {
        "input": len(content["inputs"]),
        "weight": len(content["weights"]),
        "buffer": len(content["buffers"]),
    }
    for step in content["steps"]:
        for kind, value in step["arguments"]:
            assert kind not in limits or 0 <= value < limits[kind]
        assert step["entry"] in written.source
    assert content["weights"] == list(written.params)
    assert [output["name"] for output in content["outputs"]] == [
        "last_hidden_state",
        "pooler_output",
    ]
    assert content["inputs"][-1] == {"name": "blocks", "dtype": "int32", "shape": ["blocks", 4]}
    names = [task.name for task in lowered.tasks]
    assert len(set(names)) == len(names)


def test_a_layer_takes_five_kernels(graph):
    """QKV, attention, its output, LayerNorm, two feed-forward layers, LayerNorm."""
    lowered, _ = planned(graph, "fp16")
    layers = 2
    of_layers = {"dense": 4 * layers + 1, "attention": layers, "layer_norm": 2 * layers}
    for operation, calls in of_layers.items():
        assert sum(n for task, n in lowered.tasks.items() if task.operation == operation) == calls


def test_positions_are_read_where_they_lie(graph):
    """The slice of a constant row is that row: no kernel copies it."""
    _, written = planned(graph, "fp16")
    embedding = next(s for s in written.content["steps"] if s["entry"].startswith("embedding"))
    kinds = [kind for kind, _ in embedding["arguments"][:3]]
    assert kinds == ["input", "input", "weight"]
    positions = written.params[written.content["weights"][embedding["arguments"][2][1]]]
    assert np.array_equal(positions, np.arange(512)[None])


def test_a_pooler_is_not_converted(graph):
    lowered, _ = planned(graph, "fp16")
    assert not {"rows_in", "rows_out"} & {task.operation for task in lowered.tasks}
    precisions = {t.shape["precision"] for t in lowered.tasks if "tanh" in t.shape.values()}
    assert precisions == {"fp32"}


@pytest.mark.parametrize(
    ("threads", "shared", "text"),
    [(1024, 0, "80 registers for each of 1024 threads"), (64, 166000, "167000 bytes of shared")],
)
def test_a_kernel_that_asks_for_more_than_the_gpu_has_is_refused(threads, shared, text):
    resources = {"f": cubin.Resources(registers=80, shared=1000, local=0, instructions=Counter())}
    fits = {"entry": "f", "threads": 512, "shared": 165912}
    builder._check([fits], resources, resolve("cuda-sm80"))
    with pytest.raises(BertileError, match=f"the kernel f takes {text}"):
        asks = {"entry": "f", "threads": threads, "shared": shared}
        builder._check([fits, asks], resources, resolve("cuda-sm80"))


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (lambda x: relax.op.sort(x, axis=1), "the operator sort has no kernel for a GPU"),
        (lambda x: relax.op.cumsum(x, axis=0), "cumsum runs on a GPU along the rows of a matrix"),
    ],
)
def test_an_operator_without_a_kernel_is_refused_by_name(graph, operator, text):
    ids, mask, types, table, *weights = graph.main.params
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, mask, types, table, *weights]):
        with builder.dataflow():
            out = builder.emit_output(operator(mask))
        builder.emit_func_output(out)
    attrs = {"num_input": 4, "global_symbol": "main"}
    with pytest.raises(ModelError, match=text):
        planned(graph.with_main(builder.finalize()["main"].with_attr(attrs)), "fp32")


def test_a_result_that_stands_twice_is_refused(graph):
    lowered, _ = planned(graph, "fp32")
    with pytest.raises(ModelError, match="or another output"):
        plan._Writer(graph, lowered, resolve("cuda-sm80"))._outputs([("buffer", 1)] * 2)
