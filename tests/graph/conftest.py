"""Makes small graphs to try a pass on, of a module in TVMScript or of one expression."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.graph.rewriting.dataflow import normalized
from bertile.onnx.exported import ExportedModel

CHANNELS = 8
EXPORTED = ExportedModel(
    directory=Path("small"),
    source="a test",
    sha256="",
    family="bert",
    head="",
    max_length=None,
    inputs=(),
    outputs=(),
)


def read_script(mod: tvm.IRModule, values: dict[str, np.ndarray] | None = None) -> Graph:
    """The graph of a module in TVMScript; its weights have these values, or random ones.

    Weights are the parameters of main behind the first `num_input`, none where that is not set. The
    block table, which no pass reads, need not be there, nor need `R.dataflow`.
    """
    main = mod["main"]
    if "num_input" not in (main.attrs or {}):
        main = main.with_attr("num_input", len(main.params))
    mod = relax.transform.Normalize()(tvm.IRModule({"main": main}))
    mod = relax.transform.ConvertToDataflow(min_size=1)(mod)
    weights = main.params[int(main.attrs["num_input"]) :]
    if values is None:
        values = {var.name: value_of(var.name, [int(e) for e in var.ty.shape]) for var in weights}
    assert list(values) == [var.name for var in weights]
    return Graph(tvm.IRModule({"main": tidy(mod["main"])}), values, EXPORTED)


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
    graph = Graph(builder.finalize(), values, EXPORTED)
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
def becomes() -> Callable[..., Graph]:
    """Checks that a pass turns one graph into another, and returns the graph that it has become.

    Both are modules in TVMScript, of which `values` may hold the weights before and after, or
    expressions as `make_graph` takes them.
    """

    def check(apply, before, after, *, values=(None, None), **kwargs) -> Graph:
        if isinstance(before, tvm.IRModule):
            start, expected = map(read_script, (before, after), values)
        else:
            start, expected = (make_graph(build, **kwargs) for build in (before, after))
        rewritten = apply(start)
        tvm.ir.assert_structural_equal(tidy(rewritten.main), expected.main)
        assert names(rewritten) == names(expected)
        assert rewritten.params.keys() == expected.params.keys()
        for name, value in expected.params.items():
            np.testing.assert_array_equal(rewritten.params[name], value, err_msg=name)
        return rewritten

    return check


def names(graph: Graph) -> list[str]:
    """The names of what the main of a graph takes."""
    return [var.name for var in graph.main.params]


@pytest.fixture(scope="session")
def leaves_alone() -> Callable[..., None]:
    """Checks that a pass does nothing to the graph of an expression."""

    def check(apply, before, **kwargs) -> None:
        graph = make_graph(before, **kwargs)
        tvm.ir.assert_structural_equal(apply(graph).main, graph.main)

    return check
