"""Fuses the sum of embedding rows with its LayerNorm.

    layer_norm(take(words, ids) + take(types, token_types) + take(positions, p))
        →  bertile.embedding(ids, token_types, p, words, types, positions)

A term that is a constant (positions or types that an exporter folded) becomes a table with its own
rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape, static


def fuse_embedding(graph: Graph) -> Graph:
    """Recognise sums of at least one lookup by ids of the request."""
    return rewrite(graph, _embedding)


def _embedding(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "bertile.layer_norm") or not flow.is_tokens(call):
        return None
    if ops.is_rms(call):
        return None
    x, gamma, beta = call.args
    lookups = [_lookup(flow, term) for term in _terms(flow, x)]
    if not all(lookups) or all(flow.is_weight(ids) for ids, _ in lookups):
        return None
    ids, tables = zip(*lookups)
    return ops.embedding(ids, tables, (gamma, beta), float(call.attrs["epsilon"]))


def _terms(flow: Dataflow, expr: Any) -> list[Any]:
    total = flow.call(expr, "add")
    if total is None:
        return [expr]
    return [term for side in total.args for term in _terms(flow, side)]


def _lookup(flow: Dataflow, term: Any) -> tuple[Any, Any] | None:
    """The ids (B or 1, S) and the table (V, C) of one term."""
    take = flow.call(term, "take")
    if take is not None:
        table, ids = take.args
        plain = flow.is_weight(table) and len(shape(table) or []) == 2 and take.attrs["axis"] == 0
        is_ids = len(shape(ids) or []) == 2 and ids.ty.dtype in ("int32", "int64")
        return (ids, table) if plain and is_ids else None
    extents = shape(term)
    if not flow.is_weight(term) or not extents or not all(map(static, extents)):
        return None
    rows = extents[-2] if len(extents) > 1 else 1
    if any(e != 1 for e in extents[:-2]):
        return None
    ids = relax.const(np.arange(rows, dtype="int32").reshape(1, rows))
    return ids, relax.op.reshape(term, (rows, extents[-1]))
