"""Makes bertile.layer_norm of LayerNorm, one operator or spelled out (exports before opset 17), and
of RMSNorm.

nn.layer_norm(x, gamma, beta, axes=[-1])                       →  bertile.layer_norm(x, …)
d = x - mean(x); d / sqrt(mean(d²) + epsilon) · gamma + beta   →  the same
gamma · (x · (1 / sqrt(mean(x²) + epsilon)))                   →  the same {rms}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape, static


def fuse_layer_norm(graph: Graph) -> Graph:
    """Recognise all forms, over the last axis."""
    for rule in (_operator, _spelled_out, _rms):
        graph = rewrite(graph, rule)
    return graph


def _rms(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "multiply"):
        return None
    for gamma, normed in (call.args, list(call.args)[::-1]):
        if not flow.is_weight(gamma):
            continue
        for x, root in _by_roots(flow, normed):
            epsilon = _mean_square(flow, root.args[0], x)
            if epsilon is not None:
                return _make(flow, x, gamma, _zeros(gamma), epsilon, rms=True)
    return None


def _by_roots(flow: Dataflow, expr: Any) -> Iterator[tuple[Any, relax.Call]]:
    """x and the root that it is divided by, in any spelling of ``expr``."""
    if (ratio := flow.call(expr, "divide")) is not None:
        if (root := flow.call(ratio.args[1], "sqrt")) is not None:
            yield ratio.args[0], root
    elif (product := flow.call(expr, "multiply")) is not None:
        for x, other in (product.args, list(product.args)[::-1]):
            inverse = flow.call(other, "divide")
            if (root := flow.call(other, "rsqrt")) is not None:
                yield x, root
            elif inverse is not None and flow.scalar(inverse.args[0]) == 1.0:
                if (root := flow.call(inverse.args[1], "sqrt")) is not None:
                    yield x, root


def _mean_square(flow: Dataflow, expr: Any, x: Any) -> float | None:
    """Epsilon of mean(x²) + epsilon."""
    shifted = flow.call(expr, "add")
    split = flow.split_scalar(shifted) if shifted is not None else None
    mean = flow.call(split[0], "mean") if split is not None else None
    if mean is None or not _last(mean) or not _is_square(flow, mean.args[0], x):
        return None
    return split[1]


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
    if mean is None or split is None or not _same(flow, mean.args[0], x) or not _last(mean):
        return None
    variance = flow.call(split[0], "mean")
    if (
        variance is None
        or not _last(variance)
        or not _is_square(flow, variance.args[0], ratio.args[0])
    ):
        return None
    return x, split[1]


def _is_square(flow: Dataflow, expr: Any, of: Any) -> bool:
    if (power := flow.call(expr, "power")) is not None:
        return flow.scalar(power.args[1]) == 2.0 and _same(flow, power.args[0], of)
    product = flow.call(expr, "multiply")
    return product is not None and all(_same(flow, a, of) for a in product.args)


def _last(mean: relax.Call) -> bool:
    """Whether a mean goes over the last axis and keeps it."""
    rank = len(shape(mean.args[0]) or [])
    axes = [int(a) % rank for a in mean.attrs["axis"]] if mean.attrs["axis"] and rank else []
    return axes == [rank - 1] and bool(mean.attrs["keepdims"])


def _same(flow: Dataflow, a: Any, b: Any) -> bool:
    return flow.definition(a).same_as(flow.definition(b))


def _make(flow: Dataflow, x: Any, gamma: Any, beta: Any, epsilon: float, rms: bool = False) -> Any:
    extents = shape(x)
    if not extents or not static(extents[-1]) or not flow.is_row_batch(x):
        return None
    if not all(flow.is_weight(w) and shape(w) == [extents[-1]] for w in (gamma, beta)):
        return None
    return ops.layer_norm(x, gamma, beta, epsilon, rms)
