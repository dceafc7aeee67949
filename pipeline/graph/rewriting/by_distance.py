"""Recognises products with vectors that are looked up by the distance of two tokens.

    take(reshape(matmul(x (B, H, S, D), table (1, H, D, R)), (B, H, S R)), place (S, S), axis=2)

    place of query i and key j  =  rows[i - j + longest - 1] + R i   where x are queries,
                                   rows[i - j + longest - 1] + R j   where they are keys

A query meets a key by the distance of their places, and so does a key a query.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tvm
from tvm import relax

from bertile.graph.rewriting.dataflow import Dataflow, shape, static


class ByDistance(NamedTuple):
    """``kind`` is what the ``table`` holds: "keys" where x are queries, "queries" where x are keys;
    ``rows`` are those of the distances query - key from -last to last, beyond which the outermost
    hold.
    """

    kind: str
    x: Any
    table: relax.Var
    rows: np.ndarray


def by_distance(flow: Dataflow, term: Any) -> ByDistance | None:
    """What a term of scores is by the distance of its tokens; None where it is anything else."""
    taken = flow.call(term, "take")
    if taken is None or taken.attrs["axis"] is None or int(taken.attrs["axis"]) != 2:
        return None
    flat = flow.call(taken.args[0], "reshape")
    product = flow.call(flat.args[0], "matmul") if flat is not None else None
    if product is None or len(shape(flat) or []) != 3 or len(shape(product) or []) != 4:
        return None
    table = flow.definition(product.args[1])
    count = shape(product)[3]
    if table not in flow.weights or len(shape(table)) != 4 or not _is_one(shape(table)[0]):
        return None
    for row, start in _both(flow, taken.args[1], "add"):
        kind, rows = _start(flow, start, count), _rows(flow, row)
        if kind is not None and rows is not None and rows.min() >= 0 and rows.max() < count:
            return ByDistance(kind, product.args[0], table, _trimmed(rows))
    return None


def _both(flow: Dataflow, expr: Any, name: str) -> list[tuple[Any, Any]]:
    """The operands of a call of two, in either order; [] of anything else."""
    call = flow.call(expr, name)
    return [] if call is None else [tuple(call.args), tuple(call.args)[::-1]]


def _start(flow: Dataflow, expr: Any, count: Any) -> str | None:
    """Whose place an expression is ``count`` times: that of queries, down, or of keys, across."""
    scaled = flow.call(expr, "multiply")
    split = flow.split_scalar(scaled) if scaled is not None else None
    if split is None or split[1] != count or not _counts(flow, split[0]):
        return None
    return "keys" if _is_down(split[0]) else "queries"


def _rows(flow: Dataflow, expr: Any) -> np.ndarray | None:
    """The rows that an expression looks up by query - key, the middle of which is that of 0."""
    looked = flow.call(expr, "take")
    rows = _constant(flow, looked.args[0]) if looked is not None else None
    moved = flow.call(looked.args[1], "add") if rows is not None else None
    split = flow.split_scalar(moved) if moved is not None else None
    distance = flow.call(split[0], "subtract") if split is not None else None
    if distance is None or rows.ndim != 1 or len(rows) != 2 * split[1] + 1:
        return None
    down, across = distance.args
    counted = _counts(flow, down) and _counts(flow, across)
    return rows if counted and _is_down(down) and not _is_down(across) else None


def _is_down(places: Any) -> bool:
    """Whether places are (S, 1), not (1, S)."""
    return _is_one(shape(places)[1])


def _is_one(extent: Any) -> bool:
    return static(extent) and extent == 1


def _counts(flow: Dataflow, expr: Any) -> bool:
    """Whether an expression is 0, 1, 2, … as far as the request is long, down or across."""
    if len(shape(expr) or []) != 2 or not any(map(_is_one, shape(expr))):
        return False
    while (moved := flow.call(expr, "permute_dims", "reshape", "expand_dims")) is not None:
        expr = moved.args[0]
    cut = flow.call(expr, "strided_slice")
    values = _constant(flow, cut.args[0]) if cut is not None else None
    if values is None or not np.array_equal(values.reshape(-1), np.arange(values.size)):
        return False
    begins, strides = (_numbers(flow, cut.args[place]) for place in (2, 4))
    return begins == {0} and strides == {1}


def _constant(flow: Dataflow, expr: Any) -> np.ndarray | None:
    value = flow.definition(expr)
    return value.value.numpy() if isinstance(value, tvm.ir.GenericConst) else None


def _numbers(flow: Dataflow, argument: Any) -> set[int | None]:
    """The static values of a tuple of numbers; None for one that is symbolic."""
    fields = getattr(flow.definition(argument), "fields", None) or [None]
    return {int(f) if isinstance(f, tvm.tirx.IntImm) else None for f in fields}


def _trimmed(rows: np.ndarray) -> np.ndarray:
    """The rows without those at both ends that are the same as their neighbours' for good."""
    last = len(rows) // 2
    sides = (rows[last:], rows[last::-1])
    settled = [np.flatnonzero(side != side[-1]) for side in sides]
    reach = max(1, *(int(places.max()) + 1 if places.size else 0 for places in settled))
    return rows[last - reach : last + reach + 1]
