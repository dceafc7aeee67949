"""Makes bertile.layer_norm of LayerNorm, one operator or spelled out (exports before opset 17), and
of RMSNorm.

nn.layer_norm(x, gamma, beta, axes=[-1])                       →  bertile.layer_norm(x, …)
d = x - mean(x); d / sqrt(mean(d²) + epsilon) · gamma + beta   →  the same
gamma · (x · (1 / sqrt(mean(x²) + epsilon)))                   →  the same {rms}
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape, static
from bertile.graph.rewriting.rms import is_square, over_channels, rms_norm


def fuse_layer_norm(graph: Graph) -> Graph:
    """Recognise all forms, over the last axis."""
    for rule in (_operator, _spelled_out, _rms):
        graph = rewrite(graph, rule)
    return graph


def _rms(flow: Dataflow, call: relax.Call) -> Any:
    norm = rms_norm(flow, call)
    if norm is None:
        return None
    return _make(flow, norm.x, norm.gamma, _zeros(norm.gamma), norm.epsilon, rms=True)


def _zeros(gamma: Any) -> Any:
    return relax.const(np.zeros(shape(gamma), "float32"))


def _operator(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "nn.layer_norm"):
        return None
    x, gamma, beta = call.args
    rank = len(shape(x) or [])
    last = [int(a) % rank for a in call.attrs["axes"]] == [rank - 1] if rank else False
    if not last or not call.attrs["center"] or not call.attrs["scale"]:
        return None
    return _make(flow, x, gamma, beta, float(call.attrs["epsilon"]))


def _spelled_out(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "add"):
        return None
    for scaled, beta in (call.args, list(call.args)[::-1]):
        product = flow.call(scaled, "multiply")
        if product is None or not flow.is_weight(beta):
            continue
        for quotient, gamma in (product.args, list(product.args)[::-1]):
            ratio = flow.call(quotient, "divide")
            if ratio is None or not flow.is_weight(gamma):
                continue
            standardized = _standardized(flow, ratio)
            if standardized is not None:
                return _make(flow, standardized[0], gamma, beta, standardized[1])
    return None


def _standardized(flow: Dataflow, ratio: relax.Call) -> tuple[Any, float] | None:
    """x and epsilon of (x - mean(x)) / sqrt(mean((x - mean(x))²) + epsilon)."""
    centered, root = flow.call(ratio.args[0], "subtract"), flow.call(ratio.args[1], "sqrt")
    if centered is None or root is None:
        return None
    x, mean = centered.args[0], flow.call(centered.args[1], "mean")
    shifted = flow.call(root.args[0], "add")
    split = flow.split_scalar(shifted) if shifted is not None else None
    if mean is None or split is None or not _same(flow, mean.args[0], x) or not over_channels(mean):
        return None
    variance = flow.call(split[0], "mean")
    if (
        variance is None
        or not over_channels(variance)
        or not is_square(flow, variance.args[0], ratio.args[0])
    ):
        return None
    return x, split[1]


def _same(flow: Dataflow, a: Any, b: Any) -> bool:
    return flow.definition(a).same_as(flow.definition(b))


def _make(flow: Dataflow, x: Any, gamma: Any, beta: Any, epsilon: float, rms: bool = False) -> Any:
    extents = shape(x)
    if not extents or not static(extents[-1]) or not flow.is_row_batch(x):
        return None
    if not all(flow.is_weight(w) and shape(w) == [extents[-1]] for w in (gamma, beta)):
        return None
    return ops.layer_norm(x, gamma, beta, epsilon, rms)
