"""Recognises RMSNorm in an imported graph, for the passes that fuse one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tvm import relax

from bertile.graph.rewriting.dataflow import Dataflow, shape


class RmsNorm(NamedTuple):
    """gamma · (x / √(mean(x²) + epsilon)), the mean over the last axis of x."""

    x: Any
    gamma: Any
    epsilon: float


def rms_norm(flow: Dataflow, expr: Any) -> RmsNorm | None:
    """The RMSNorm that ``expr`` computes, by a weight for each channel; None if it is none."""
    product = flow.call(expr, "multiply")
    if product is None:
        return None
    for gamma, normed in (product.args, list(product.args)[::-1]):
        if not flow.is_weight(gamma):
            continue
        for x, root in _by_roots(flow, normed):
            epsilon = _mean_square(flow, root.args[0], x)
            if epsilon is not None and shape(gamma) == shape(x)[-1:]:
                return RmsNorm(x, gamma, epsilon)
    return None


def is_square(flow: Dataflow, expr: Any, of: Any) -> bool:
    """Whether ``expr`` is the square of ``of``."""
    if (power := flow.call(expr, "power")) is not None:
        return flow.scalar(power.args[1]) == 2.0 and _same(flow, power.args[0], of)
    product = flow.call(expr, "multiply")
    return product is not None and all(_same(flow, a, of) for a in product.args)


def over_channels(mean: relax.Call) -> bool:
    """Whether a mean goes over the last axis and keeps it."""
    rank = len(shape(mean.args[0]) or [])
    axes = [int(a) % rank for a in mean.attrs["axis"]] if mean.attrs["axis"] and rank else []
    return axes == [rank - 1] and bool(mean.attrs["keepdims"])


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
    if mean is None or not over_channels(mean) or not is_square(flow, mean.args[0], x):
        return None
    return split[1]


def _same(flow: Dataflow, a: Any, b: Any) -> bool:
    return flow.definition(a).same_as(flow.definition(b))
