"""Computes once, at build time, what is computed of weights alone.

    concat(wq, wk, wv), permute_dims(w), reshape(p) …  →  one more weight

By numpy, not by TVM's LiftTransformParams: that runs unscheduled loops over hundreds of megabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import tvm
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, replace, shape, static
from bertile.graph.rewriting.folding import FOLDED


def fold_weights(graph: Graph) -> Graph:
    """Evaluate expressions of weights, and drop the weights that nobody reads any more."""
    flow = Dataflow(graph.main)
    known: dict[relax.Var, Any] = {var: graph.params[var.name] for var in flow.weights}
    folded: dict[relax.Var, relax.Var] = {}
    params = dict(graph.params)
    for binding in flow.bindings:
        value = _evaluate(binding.value, known)
        if value is None:
            continue
        known[binding.var] = value
        if isinstance(value, np.ndarray) and isinstance(binding.value, relax.Call):
            name = joined(_weights(flow, binding.var)) or f"{binding.var.name}_folded"
            while name in params:
                name += "_folded"
            folded[binding.var] = relax.Var(name, binding.var.ty)
            params[name] = value
    main = graph.main
    wider = relax.Function(
        [*main.params, *folded.values()], main.body, main.ret_ty, True, main.attrs
    )
    return _without_unused(
        replace(dataclasses.replace(graph.with_main(wider), params=params), folded)
    )


def joined(names: Sequence[str]) -> str:
    """One name for what several weights become: "a.q.weight", "a.k.weight" → "a.q_k.weight".

    Reports name layers by their weights, so that a person must recognise them.
    """
    parts = [name.split(".") for name in names]
    head = _beginning(parts)
    rest = [part[len(head) :] for part in parts]
    tail = _beginning([part[::-1] for part in rest])[::-1]
    middle = "_".join(".".join(part[: len(part) - len(tail)]) for part in rest).strip("_")
    return ".".join([*head, *([middle] if middle else []), *tail])


def _beginning(parts: Sequence[Sequence[str]]) -> list[str]:
    """What all parts begin with."""
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, zip(*parts))]


def _weights(flow: Dataflow, expr: Any) -> list[str]:
    """The names of the weights that an expression is computed of, each once."""
    value = flow.definition(expr)
    if isinstance(value, relax.Var):
        return [value.name] if value in flow.weights else []
    parts = value.fields if isinstance(value, relax.Tuple) else getattr(value, "args", [])
    return list(dict.fromkeys(name for part in parts for name in _weights(flow, part)))


def _evaluate(expr: Any, known: dict[relax.Var, Any]) -> Any:
    """The value of an expression of known ones, else None."""
    if isinstance(expr, relax.Var):
        return known.get(expr)
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    if isinstance(expr, relax.ShapeExpr):
        return ()
    if isinstance(expr, relax.Tuple):
        fields = [_evaluate(field, known) for field in expr.fields]
        return None if any(f is None for f in fields) else fields
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name in FOLDED:
        args = [_evaluate(arg, known) for arg in expr.args]
        if any(a is None for a in args) or not all(map(static, shape(expr) or [None])):
            return None
        return np.ascontiguousarray(FOLDED[expr.op.name](expr, *args))
    return None


def _without_unused(graph: Graph) -> Graph:
    main = relax.transform.CanonicalizeBindings()(graph.mod)["main"]
    used = {var.name for var in Dataflow(main).used()}
    count = int(main.attrs["num_input"])
    weights = [p for p in main.params[count:] if p.name in used]
    params = [*main.params[:count], *weights]
    slim = relax.Function(params, main.body, main.ret_ty, True, main.attrs)
    kept = {p.name: graph.params[p.name] for p in weights}
    return dataclasses.replace(graph.with_main(slim), params=kept)
