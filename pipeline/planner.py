"""An optimized graph and a precision come in; the graph whose layers know theirs goes out."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import relax

from bertile import ops
from bertile.errors import PlatformError
from bertile.graph import Graph
from bertile.passes.rewriting import Dataflow, rewrite
from bertile.precision import LayerPlan
from bertile.targets import Target

FEW_ROWS = "it sees one row a sequence: too little work to gain anything"


def check(precision: str, row: Target) -> None:
    """PlatformError where the target cannot compute in that precision."""
    if precision == "bf16" and not row.bf16:
        raise PlatformError(
            f"target {row.name} has no bfloat16 instructions (its features end in"
            f" {' '.join(row.features[-2:])})",
            "compile with --precision fp32 or int8, or for a target that has avx512_bf16",
        )


def plan_precision(graph: Graph, precision: str, row: Target) -> Graph:
    """Give every linear layer and attention its precision: the plan's, else the one asked for.

    Layers behind the first token stay in float32, embedding tables are stored in float16 where
    float32 is not asked for. Attention multiplies in bfloat16 wherever the
    target can and float32 is not asked for: it is faster than bytes there, which would need a
    range per row of scores.
    """
    check(precision, row)
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
    return made and int(call.attrs["head_size"]) % 2 == 0
