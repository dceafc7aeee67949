"""Recognises a linear layer in an imported graph, for the passes that fuse around one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from bertile.graph.rewriting.dataflow import Dataflow, shape, static


@dataclass(frozen=True)
class Linear:
    """x w + b; ``b`` is None where nothing is added."""

    x: Any
    w: Any
    b: Any | None

    def bias(self) -> Any:
        """The bias, zeros where there is none."""
        if self.b is not None:
            return self.b
        return relax.const(np.zeros(shape(self.w)[1], "float32"))


def linear(flow: Dataflow, expr: Any) -> Linear | None:
    """The linear layer that ``expr`` computes, with a weight known at build time; None if it is
    none.
    """
    product = flow.call(expr, "matmul")
    if product is not None:
        return _product(flow, product)
    total = flow.call(expr, "add")
    if total is None:
        return None
    for value, bias in (total.args, list(total.args)[::-1]):
        product = flow.call(value, "matmul")
        linear = _product(flow, product) if product is not None and flow.used_once(value) else None
        if linear and flow.is_weight(bias) and shape(bias) == [shape(linear.w)[1]]:
            return Linear(linear.x, linear.w, bias)
    return None


def _product(flow: Dataflow, product: relax.Call) -> Linear | None:
    x, w = product.args
    extents = shape(w)
    if extents is None or len(extents) != 2 or not all(map(static, extents)):
        return None
    if not flow.is_weight(w) or flow.is_weight(x) or not flow.is_row_batch(x):
        return None
    return Linear(x, w, None) if x.ty.dtype == w.ty.dtype == "float32" else None
