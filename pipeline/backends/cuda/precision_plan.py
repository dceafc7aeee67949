"""Chooses what each layer is computed in on a GPU."""

from __future__ import annotations

import dataclasses

from bertile.backends.cuda.precisions import check
from bertile.graph.graph import Graph
from bertile.lower import layer_precisions
from bertile.numerics.precision import PRECISIONS, LayerPlan
from bertile.targets.rows import Target


def plan_layers(graph: Graph, precision: str, row: Target) -> Graph:
    """Give every layer its precision.

    Tokens are of one type everywhere, beside layers in int8 float16; a layer of which the plan
    says anything but int8 is computed in that type too.
    """
    check(precision, row)
    quantized = PRECISIONS[precision].quantized or any(p.quantized for p in graph.plan.values())
    tokens = "fp16" if quantized else precision

    def of_tokens(plan: LayerPlan) -> LayerPlan:
        return plan if plan.quantized else dataclasses.replace(plan, precision=tokens)

    rules = dict.fromkeys(("attention", "embedding"), lambda flow, call: tokens)
    return layer_precisions.assigned(graph, precision, rules, of_tokens)
