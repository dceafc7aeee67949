"""Chooses what each layer is computed in on a processor, and its dense or its sparse kernel."""

from __future__ import annotations

import dataclasses

from tvm import relax

from bertile.backends.cpu.precisions import PRECISIONS, check
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow
from bertile.lower import layer_precisions
from bertile.lower.forms import Forms
from bertile.lower.sparse_choice import SparseChoice
from bertile.numerics.eight_bit import bounded_scales
from bertile.numerics.precision import LayerPlan
from bertile.schedules.cpu.precisions import PRECISIONS as PRODUCTS
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import TuningLog


def higher(row: Target) -> tuple[str, ...]:
    """What a layer may be computed in that is not worth its place in int8."""
    return ("bf16", "fp32") if row.bf16 else ("fp32",)


def plan_layers(
    graph: Graph, precision: str, row: Target, log: TuningLog | None = None, sparse: str = "off"
) -> Graph:
    """Give every linear layer and attention its precision, the plan's, else the one asked for; and
    every linear layer the dense or the sparse kernel, as ``SparseChoice`` chooses by `sparse`.

    A layer that ``log`` knows to be slower in 8 bits than in more is not quantized, each with its
    faster kernel.
    """
    check(precision, row)
    choice = SparseChoice(graph.params, row, log, sparse)
    planned = _assigned(graph, precision, row)
    if slower := _slower(planned, row, choice):
        plan = {**graph.plan, **slower}
        planned = _assigned(dataclasses.replace(graph, plan=plan), precision, row)
    return choice.apply(planned)


def _assigned(graph: Graph, precision: str, row: Target) -> Graph:
    here = PRECISIONS[precision]

    def attention(flow: Dataflow, call: relax.Call) -> str:
        may = here.attention != "bf16" or (row.bf16 and _pairs(flow, call))
        return here.attention if may else "fp32"

    rules = {"attention": attention, "embedding": lambda flow, call: here.tables}
    graph = layer_precisions.assigned(graph, precision, rules)
    return _with_bounds(graph) if PRODUCTS["int8_bounded"].arithmetic(row).run > 1 else graph


def _with_bounds(graph: Graph) -> Graph:
    """The layers in bytes whose weights may be rounded so that products are summed in 16 bits."""

    def planned(name: str, layer: LayerPlan) -> LayerPlan:
        if layer.precision != "int8" or layer.bounded is not None:
            return layer
        w = graph.params[name]
        w = w if layer.smooth is None else w / layer.smooth[:, None]
        return dataclasses.replace(layer, bounded=bounded_scales(w))

    plan = {name: planned(name, layer) for name, layer in graph.plan.items()}
    return dataclasses.replace(graph, plan=plan)


def _pairs(flow: Dataflow, call: relax.Call) -> bool:
    """Whether Q, K and V come from one layer that can write them in pairs, or from what turns all
    heads of Q and of K.
    """
    qkv, spec = call.args[0], ops.attention_spec(call)
    rotary = flow.call(qkv, "bertile.rotary")
    whole = rotary is not None and int(rotary.attrs["heads"]) == spec.heads + spec.kv_heads
    alone = (whole or flow.is_op(qkv, "bertile.dense")) and flow.used_once(qkv)
    return alone and spec.head_size % 2 == 0


def _slower(graph: Graph, row: Target, choice: SparseChoice) -> dict[str, LayerPlan]:
    """The layers whose kernel for bytes has been measured, and lost, against one of more digits."""
    forms, slower = Forms(graph), {}
    for binding in forms.flow.bindings:
        call = binding.value
        if not ops.is_call(call, "bertile.dense") or ops.precision(call) != "int8":
            continue
        name, task = call.args[1].name, forms.task(binding.var)
        mine = choice.time(name, task)
        for precision in higher(row):
            other = choice.time(name, _in_precision(task, precision))
            share = choice.share(other, mine) if mine and other else None
            if mine and share is not None and share < 1:
                why = f"in {precision} it takes {share:.2f} of the time that it takes in int8"
                slower[name] = LayerPlan(precision, why=why, slower=mine.task)
                break
    return slower


def _in_precision(task: Task, precision: str) -> Task:
    """The same layer in float32 or bfloat16, writing float32 where bytes were written."""
    shape = {k: v for k, v in task.shape.items() if k != "precision" and v != "to_int8"}
    return Task(task.operation, shape if precision == "fp32" else {**shape, "precision": precision})
