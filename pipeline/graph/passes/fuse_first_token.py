"""Takes the [CLS] token straight from the encoder's layout, without making the whole output
row-major.

take(x, 0, axis=1), or x[:, 0:1] squeezed  →  bertile.first_token(x)
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape


def fuse_first_token(graph: Graph) -> Graph:
    """Recognise the first position of what one of our operators computed."""
    return rewrite(graph, _first)


def _first(flow: Dataflow, call: relax.Call) -> Any:
    source = None
    if flow.is_op(call, "take") and call.attrs["axis"] == 1 and flow.scalar(call.args[1]) == 0:
        source = call.args[0] if shape(call.args[1]) == [] else None
    elif flow.is_op(call, "squeeze", "reshape") and len(shape(call) or []) == 2:
        cut = flow.call(call.args[0], "strided_slice")
        if cut is not None and _numbers(flow, cut.args[1:4]) == [[1], [0], [1]]:
            source = cut.args[0]
    if source is None or not ops.is_ours(flow.definition(source)) or not flow.is_tokens(source):
        return None
    # a reshape may as well put the first tokens of all rows in one
    return ops.first_token(source) if shape(call)[-1] == shape(source)[-1] else None


def _numbers(flow: Dataflow, arguments: Any) -> list[list[int]] | None:
    """The static values of tuples of numbers; None for anything symbolic."""
    values = []
    for argument in arguments:
        fields = getattr(flow.definition(argument), "fields", None)
        if not fields or not all(isinstance(f, tvm.tirx.IntImm) for f in fields):
            return None
        values.append([int(f) for f in fields])
    return values
