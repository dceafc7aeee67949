"""Chooses what each layer is computed in on a processor, and its dense or its sparse kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import relax

from bertile.base.errors import PlatformError
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite
from bertile.lower.forms import Forms
from bertile.lower.sparse_choice import SparseChoice
from bertile.numerics.precision import LayerPlan
from bertile.schedules.task import Task
from bertile.targets.rows import Target
from bertile.tune.log.tuning_log import TuningLog

FEW_ROWS = "it sees one row a sequence: too little work to gain anything"


def check(precision: str, row: Target) -> None:
    """PlatformError where the target cannot compute in that precision."""
    if precision == "tf32":
        raise PlatformError(
            f"target {row.name} has no tf32: tensor cores of NVIDIA GPUs from cuda-sm80 on have it",
            "compile with --precision fp32",
        )
    if precision == "bf16" and not row.bf16:
        raise PlatformError(
            f"target {row.name} has no bfloat16 instructions (its features end in"
            f" {' '.join(row.features[-2:])})",
            "compile with --precision fp32 or int8, or for a target that has avx512_bf16",
        )


def higher(row: Target) -> tuple[str, ...]:
    """What a layer may be computed in that is not worth its place in int8."""
    return ("bf16", "fp32") if row.bf16 else ("fp32",)


def plan_layers(
    graph: Graph, precision: str, row: Target, log: TuningLog | None = None, sparse: str = "off"
) -> Graph:
    """Give every linear layer and attention its precision, the plan's, else the one asked for; and
    every linear layer the dense or the sparse kernel, as ``SparseChoice`` chooses by `sparse`.

    Layers behind the first token stay in float32, embedding tables are stored in float16 where
    float32 is not asked for. Attention multiplies in bfloat16 wherever the target can and float32
    is not asked for: it is faster than bytes there, which would need a range per row of scores.
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
    plan = dict(graph.plan)

    def layer(flow: Dataflow, call: relax.Call) -> Any:
        if ops.is_call(call, "bertile.attention"):
            wanted = precision in ("bf16", "int8") and row.bf16 and _pairs(flow, call)
            return ops.with_precision(call, "bf16") if wanted else None
        if ops.is_call(call, "bertile.embedding"):
            return ops.with_precision(call, "fp16") if precision != "fp32" else None
        if not ops.is_call(call, "bertile.dense"):
            return None
        weight = flow.definition(call.args[1])
        name = weight.name if isinstance(weight, relax.Var) else ""
        found = plan.get(name, LayerPlan(precision))
        if found.precision != "fp32" and not flow.is_tokens(call.args[0]):
            found = LayerPlan("fp32", why=FEW_ROWS)
        plan[name] = found
        return ops.with_precision(call, found.precision) if found.precision != "fp32" else None

    graph = rewrite(graph, layer)
    return dataclasses.replace(graph, plan=plan)


def _pairs(flow: Dataflow, call: relax.Call) -> bool:
    """Whether Q, K and V come from one layer that can write them in pairs."""
    qkv = call.args[0]
    made = flow.is_op(qkv, "bertile.dense") and flow.used_once(qkv)
    return made and ops.attention_spec(call).head_size % 2 == 0


def _slower(graph: Graph, row: Target, choice: SparseChoice) -> dict[str, LayerPlan]:
    """The layers whose kernel for bytes has been measured, and lost, against one of more digits."""
    forms, found = Forms(graph), {}
    for binding in forms.flow.bindings:
        call = binding.value
        if not ops.is_call(call, "bertile.dense") or ops.precision(call) != "int8":
            continue
        name, task = call.args[1].name, forms.task(binding.var)
        mine = choice.time(name, task)
        for precision in higher(row):
            other = choice.time(name, _in_precision(task, precision))
            if mine and other and other.threads == mine.threads and other.median < mine.median:
                why = f"in int8 it takes {mine.median:.0f} us, in {precision} {other.median:.0f}"
                found[name] = LayerPlan(precision, why=why)
                break
    return found


def _in_precision(task: Task, precision: str) -> Task:
    """The same layer in float32 or bfloat16, writing float32 where bytes were written."""
    shape = {k: v for k, v in task.shape.items() if k != "precision" and v != "to_int8"}
    return Task(task.operation, shape if precision == "fp32" else {**shape, "precision": precision})
