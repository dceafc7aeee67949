"""Cuts the graph of a model with early heads into stages, each from the last one's states to the
logits of the next head.

before    main(ids, mask, blocks)       → logits, exits.2, exits.4

after     stage 1 (ids, mask, blocks)    → h2, exits.2
          stage 2 (ids, mask, blocks, h2) → h4, exits.4
          stage 3 (ids, mask, blocks, h4) → logits

Between two stages a loader leaves out the texts that are sure of their answer. What hangs on the
inputs alone, as the mask of attention does, every stage computes for itself: it is of the texts
that are left by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from bertile.base.errors import ModelError
from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, variables

Vars = Sequence[relax.Var]


@dataclass(frozen=True)
class Stage:
    """A graph whose inputs end with `states`, and whose results begin with as many as `gives`.

    States are (batch, length, C) of the whole model's main function.
    """

    graph: Graph
    states: tuple[relax.Var, ...]
    gives: int


@dataclass(frozen=True)
class StageEntry:
    """The function of a library that runs a stage; it takes the model's inputs, so many states of
    the stage before, and the weights of these names.
    """

    entry: str
    states: int
    weights: list[str]


def cut(graph: Graph) -> list[Stage]:
    """The stages of a graph in the order in which they run; [] of a model without early heads.

    Raises ModelError where a layer behind a head reads more of those before it than their states.
    """
    exported = graph.exported
    if not exported.exits:
        return []
    flow = Dataflow(graph.main)
    results = dict(zip(exported.outputs, flow.definition(graph.main.body.body).fields))
    early = [results[name] for name in exported.early_outputs]
    (last,) = (value for name, value in results.items() if name not in exported.early_outputs)
    ends, stages = [*early, last], []
    states: tuple[relax.Var, ...] = ()
    done: set[relax.Var] = set()
    for place, end in enumerate(ends):
        mine, _ = _needed(flow, end, states)
        again = done & mine
        if any(ops.is_ours(flow.definition(var)) for var in again):
            raise ModelError(
                f"the model cannot be cut behind layer {exported.exits[place - 1]}: what follows"
                " reads more of the layers before than what they hand on",
                "compile it without --exit-threshold",
            )
        done |= mine
        handed = _handed_on(flow, ends[place + 1 :], {*states, *mine})
        stages.append(Stage(_graph(graph, flow, mine, states, (*handed, end)), states, len(handed)))
        states = handed
    return stages


def _needed(
    flow: Dataflow, end: relax.Var, known: Collection[relax.Var]
) -> tuple[set[relax.Var], set[relax.Var]]:
    """The variables behind a result that are to be computed, and the known ones that they read."""
    bound = {binding.var: binding.value for binding in flow.bindings}
    mine: set[relax.Var] = set()
    read: set[relax.Var] = set()
    waiting = [end]
    while waiting:
        var = waiting.pop()
        if var in known:
            read.add(var)
        elif var in bound and var not in mine:
            mine.add(var)
            waiting += variables(bound[var])
    return mine, read


def _handed_on(flow: Dataflow, ends: Vars, done: Collection[relax.Var]) -> tuple[relax.Var, ...]:
    """The states among what is done that later results read."""
    states = {var for var in done if flow.is_tokens(var)}
    read = set().union(*(_needed(flow, end, states)[1] for end in ends))
    return tuple(binding.var for binding in flow.bindings if binding.var in read)


def _graph(
    graph: Graph, flow: Dataflow, mine: Collection[relax.Var], states: Vars, results: Sequence[Any]
) -> Graph:
    """The part of a graph that computes these variables, as a main function of its own."""
    main = graph.main
    count = int(main.attrs["num_input"])
    bindings = [binding for binding in flow.bindings if binding.var in mine]
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], relax.Tuple(results))
    params = [*main.params[:count], *states, *main.params[count:]]
    kind = relax.TupleType([result.ty for result in results])
    attrs = {**dict(main.attrs.items()), "num_input": count + len(states)}
    return dataclasses.replace(graph).with_main(
        relax.Function(params, body, kind, True).with_attr(attrs)
    )
