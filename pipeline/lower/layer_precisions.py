"""Gives every operator of a graph its precision, by a backend's rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite
from bertile.numerics.precision import LayerPlan

FEW_ROWS = "it runs on one row of each sequence: too little work to gain from int8"
# What an operator without a plan of its own is computed in.
Rule = Callable[[Dataflow, relax.Call], str]


def assigned(
    graph: Graph,
    precision: str,
    rules: Mapping[str, Rule],
    of_tokens: Callable[[LayerPlan], LayerPlan] = lambda plan: plan,
) -> Graph:
    """The graph whose linear layers have the plan's precision, else the one asked for, and whose
    other operators that have one, by their names in ``rules``, what these say.

    Layers behind the first token stay in float32; ``of_tokens`` has the last word on the others.
    """
    plan = dict(graph.plan)

    def layer(flow: Dataflow, call: relax.Call) -> Any:
        if ops.is_call(call, "bertile.dense"):
            chosen = of_layer(flow, call)
        elif ops.is_ours(call) and ops.name(call) in rules:
            chosen = rules[ops.name(call)](flow, call)
        else:
            chosen = "fp32"
        return ops.with_precision(call, chosen) if chosen != "fp32" else None

    def of_layer(flow: Dataflow, call: relax.Call) -> str:
        weight = flow.definition(call.args[1])
        name = weight.name if isinstance(weight, relax.Var) else ""
        mine = plan.get(name, LayerPlan(precision))
        if flow.is_tokens(call.args[0]):
            mine = of_tokens(mine)
        elif mine.precision != "fp32":
            mine = LayerPlan("fp32", why=FEW_ROWS)
        plan[name] = mine
        return mine.precision

    graph = rewrite(graph, layer)
    return dataclasses.replace(graph, plan=plan)
