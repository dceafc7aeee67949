"""Small graphs to try a pass on: one expression of a request, the block table and weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.graph.rewriting.dataflow import normalized

CHANNELS = 8


def make_graph(
    build: Callable,
    *,
    activations: dict | None = None,
    weights: dict | None = None,
) -> Graph:
    """The graph of ``build(emit, ids, *activations, *weights)``.

    ``activations`` and ``weights`` map names to shapes, in which "batch" and "length" are the
    request's own; what is named …_ids is int64. ``emit`` gives a value that is used twice a
    variable.
    """
    symbols = {name: tvm.tirx.Var(name, "int64") for name in ("batch", "length", "m")}
    request = [symbols["batch"], symbols["length"]]

    def variable(name, shape, dtype="float32"):
        return relax.Var(name, relax.TensorType([symbols.get(e, e) for e in shape], dtype))

    activations = {"x": ("batch", "length", CHANNELS)} if activations is None else activations
    values = {name: value_of(name, shape) for name, shape in (weights or {}).items()}
    inputs = [relax.Var("input_ids", relax.TensorType(request, "int64"))]
    inputs += [
        variable(name, shape, "int64" if name.endswith("_ids") else "float32")
        for name, shape in activations.items()
    ]
    held = [variable(name, shape) for name, shape in (weights or {}).items()]
    table = variable(TABLE, ("m", 4), "int32")
    builder = relax.BlockBuilder()
    params = [*inputs, table, *held]
    with builder.function("main", params, attrs={"num_input": len(inputs) + 1}):
        with builder.dataflow():
            result = build(builder.emit, *inputs, *held)
            output = builder.emit_output(builder.normalize(result))
        builder.emit_func_output(output)
    graph = Graph(builder.finalize(), values, None)
    return graph.with_main(tidy(graph.main))


def tidy(main: relax.Function) -> relax.Function:
    """Without nested calls, renamings and bindings that nobody reads."""
    mod = relax.transform.CanonicalizeBindings()(tvm.IRModule({"main": normalized(main)}))
    return normalized(mod["main"])


def value_of(name: str, shape: tuple) -> np.ndarray:
    """The same random weight for the same name."""
    seed = int.from_bytes(name.encode(), "little") % 2**32
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.fixture(scope="session")
def graph() -> Callable[..., Graph]:
    return make_graph


@pytest.fixture(scope="session")
def becomes() -> Callable[..., None]:
    """Checks that a pass turns the graph of one expression into that of another."""

    def check(apply, before, expected, **kwargs) -> None:
        rewritten = apply(make_graph(before, **kwargs))
        tvm.ir.assert_structural_equal(tidy(rewritten.main), make_graph(expected, **kwargs).main)

    return check


@pytest.fixture(scope="session")
def leaves_alone() -> Callable[..., None]:
    """Checks that a pass does nothing to the graph of an expression."""

    def check(apply, before, **kwargs) -> None:
        graph = make_graph(before, **kwargs)
        tvm.ir.assert_structural_equal(apply(graph).main, graph.main)

    return check
