"""Runs TVM's own clean-up passes, and folds the index arithmetic that every imported Gather drags
along.

where(i < 0, i + n, i)   →   i          ids are never negative: the loader checks them
where(false, a, b)       →   b
take(x, i, mode=fast)    →   mode=clip  an index out of range reads a wrong row, not foreign memory
astype(x, x's own)       →   x          TorchScript writes a Cast for `.to(device)`, as ERNIE's
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, same_shape


def simplify(graph: Graph) -> Graph:
    """Fold constants, merge equal expressions, drop what is unused."""
    graph = _fold(rewrite(graph, _clip))  # clip first: TVM warns of every unchecked index it folds
    for rule in (_plain_index, _decided, _own_type):
        graph = rewrite(graph, rule)
    return _fold(graph)


def _fold(graph: Graph) -> Graph:
    passes = tvm.transform.Sequential(
        [
            relax.transform.CanonicalizeBindings(),
            relax.transform.FoldConstant(),
            relax.transform.EliminateCommonSubexpr(),
            relax.transform.DeadCodeElimination(["main"]),
        ]
    )
    with tvm.target.Target({"kind": "llvm"}):
        return dataclasses.replace(graph, mod=passes(graph.mod))


def _plain_index(flow: Dataflow, call: relax.Call) -> Any:
    if not (flow.is_op(call, "where") and flow.is_op(call.args[0], "less")):
        return None
    index = call.args[2]
    negative, shifted = flow.call(call.args[0], "less"), flow.call(call.args[1], "add")
    if shifted is None or flow.scalar(negative.args[1]) != 0:
        return None
    same = negative.args[0].same_as(index) and any(a.same_as(index) for a in shifted.args)
    return index if same else None


def _clip(flow: Dataflow, call: relax.Call) -> Any:
    if flow.is_op(call, "take") and call.attrs["mode"] == "fast":
        return relax.op.take(*call.args, axis=call.attrs["axis"], mode="clip")
    return None


def _decided(flow: Dataflow, call: relax.Call) -> Any:
    decided = flow.scalar(call.args[0]) if flow.is_op(call, "where") else None
    if decided is None:
        return None
    chosen = call.args[1] if decided else call.args[2]
    return chosen if same_shape(chosen, call) else None


def _own_type(flow: Dataflow, call: relax.Call) -> Any:
    same = flow.is_op(call, "astype") and call.args[0].ty.dtype == call.attrs["dtype"]
    return call.args[0] if same else None
