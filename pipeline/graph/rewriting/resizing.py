"""Gives weights of a graph other sizes, and infers everything computed of them anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, replace


class Resized:
    """New weights for a graph, one after the other; `write` gives the graph that reads them."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.flow = graph, Dataflow(graph.main)
        self.resized: dict[relax.Var, relax.Var] = {}  # old → new
        self.values: dict[str, np.ndarray] = {}

    def __call__(self, old: Any, value: np.ndarray, readers: int = 1) -> Any:
        """What is read in the place of `old` by so many of its readers.

        It has the old name, by which plans and reports know it, if these are all.
        """
        value = np.ascontiguousarray(value, "float32")
        if not isinstance(old, relax.Var):
            return relax.const(value)
        name = old.name
        if self.flow.uses(old) > readers:
            while name in self.graph.params or name in self.values:
                name += "_resized"
        self.resized[old] = relax.Var(name, relax.TensorType(value.shape, "float32"))
        self.values[name] = value
        return self.resized[old]

    def write(self, values: dict[relax.Var, Any]) -> Graph:
        """The graph in which these variables have these values."""
        main = self.graph.main
        params = [*main.params, *self.resized.values()]
        graph = self.graph.with_main(
            relax.Function(params, main.body, main.ret_ty, True, main.attrs)
        )
        main = replace(graph, values).main
        used = Dataflow(main).used()
        count = int(main.attrs["num_input"])
        inputs, weights = main.params[:count], []
        for old in self.graph.main.params[count:]:
            weights += [old] if old not in self.resized or old in used else []
            weights += [self.resized[old]] if old in self.resized else []
        function = relax.Function([*inputs, *weights], main.body, main.ret_ty, True, main.attrs)
        held = {**self.graph.params, **self.values}
        params = {var.name: held[var.name] for var in weights}
        return dataclasses.replace(graph.with_main(function), params=params)
