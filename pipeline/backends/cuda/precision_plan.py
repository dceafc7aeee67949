"""Chooses what each layer is computed in on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm import relax

from bertile.base.errors import PlatformError
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite
from bertile.lower.precision_choice import FEW_ROWS
from bertile.numerics.precision import LayerPlan
from bertile.targets.rows import Target


def check(precision: str, row: Target) -> None:
    """PlatformError where the GPU cannot compute in that precision."""
    if precision == "tf32" and not row.gpu.async_copy:
        raise PlatformError(
            f"target {row.name} has no tf32: tensor cores of NVIDIA GPUs from cuda-sm80 on have it",
            "compile with --precision fp32",
        )
    if precision == "bf16" and not row.bf16:
        raise PlatformError(
            f"target {row.name} has no bfloat16: tensor cores have it from cuda-sm80 on",
            "compile with --precision fp16",
        )


def plan_layers(graph: Graph, precision: str, row: Target) -> Graph:
    """Give every layer its precision.

    Tokens are of one type everywhere, beside layers in int8 float16; a layer of which the plan
    says anything but int8 is computed in that type too.
    """
    check(precision, row)
    plan = dict(graph.plan)
    quantized = precision == "int8" or any(one.precision == "int8" for one in plan.values())
    tokens = "fp16" if quantized else precision

    def layer(flow: Dataflow, call: relax.Call) -> Any:
        if any(ops.is_call(call, f"bertile.{name}") for name in ("attention", "embedding")):
            return ops.with_precision(call, tokens)
        if not ops.is_call(call, "bertile.dense"):
            return None
        weight = flow.definition(call.args[1])
        name = weight.name if isinstance(weight, relax.Var) else ""
        found = plan.get(name, LayerPlan(precision))
        if not flow.is_tokens(call.args[0]):
            found = LayerPlan("fp32", why=FEW_ROWS)
        elif found.precision != "int8":
            found = dataclasses.replace(found, precision=tokens)
        plan[name] = found
        return ops.with_precision(call, found.precision)

    graph = rewrite(graph, layer)
    return dataclasses.replace(graph, plan=plan)
