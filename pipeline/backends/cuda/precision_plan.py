"""Chooses what each layer is computed in on a GPU."""

from __future__ import annotations

import dataclasses

from bertile.base.errors import PlatformError
from bertile.graph.graph import Graph
from bertile.lower import layer_precisions
from bertile.numerics.precision import PRECISIONS, LayerPlan
from bertile.targets.rows import Target


def check(precision: str, row: Target) -> None:
    """PlatformError where the GPU cannot compute in that precision."""
    if PRECISIONS[precision].groups:
        raise PlatformError(
            f"target {row.name} has no {precision}: kernels of 4-bit weights are for processors",
            "compile with --precision int8",
        )
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
    quantized = PRECISIONS[precision].quantized or any(p.quantized for p in graph.plan.values())
    tokens = "fp16" if quantized else precision

    def of_tokens(plan: LayerPlan) -> LayerPlan:
        return plan if plan.quantized else dataclasses.replace(plan, precision=tokens)

    rules = dict.fromkeys(("attention", "embedding"), lambda flow, call: tokens)
    return layer_precisions.assigned(graph, precision, rules, of_tokens)
