"""The ordered list of passes, what it is called, and the modules that --dump-ir writes."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from bertile.graph import order, passes
from bertile.graph.graph import Graph
from bertile.graph.importer import TABLE
from bertile.graph.rewriting.dataflow import normalized


@pytest.fixture(scope="module")
def graph() -> Graph:
    """One linear layer with a GELU."""
    batch, length, blocks = (tvm.tirx.Var(name, "int64") for name in ("batch", "length", "m"))
    values = {"w": np.ones((8, 6), "float32"), "b": np.ones(6, "float32")}
    ids = relax.Var("input_ids", relax.TensorType([batch, length], "int64"))
    x = relax.Var("x", relax.TensorType([batch, length, 8], "float32"))
    table = relax.Var(TABLE, relax.TensorType([blocks, 4], "int32"))
    weights = [relax.Var(n, relax.TensorType(v.shape, "float32")) for n, v in values.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, x, table, *weights], attrs={"num_input": 3}):
        with builder.dataflow():
            y = builder.normalize(op.nn.gelu(op.add(op.matmul(x, weights[0]), weights[1])))
            result = builder.emit_output(y)
        builder.emit_func_output(result)
    layer = Graph(builder.finalize(), values, None)
    return layer.with_main(normalized(layer.main))


def test_every_pass_is_in_the_list_once():
    files = {module.name for module in pkgutil.iter_modules(passes.__path__)}
    names = order.pass_names()
    assert set(names) == files
    assert [name for name in set(names) if names.count(name) > 1] == ["simplify"]


def test_every_pass_has_the_name_of_its_file_and_a_test():
    tests = Path(__file__).parent / "passes"
    for name in order.pass_names():
        module = importlib.import_module(f"bertile.graph.passes.{name}")
        assert getattr(module, name).__module__ == module.__name__
        assert (tests / f"test_{name}.py").exists()


def test_optimizing_fuses_the_layer(graph):
    optimized = order.optimize(graph)
    (block,) = optimized.main.body.blocks
    (call,) = (b.value for b in block.bindings if isinstance(b.value, relax.Call))
    assert call.op.name == "bertile.dense" and call.attrs["activation"] == "gelu"


def test_optimizing_leaves_its_argument_as_it_was(graph):
    before = graph.mod.script()
    order.optimize(graph)
    assert graph.mod.script() == before


def test_optimizing_twice_changes_nothing(graph):
    once = order.optimize(graph)
    twice = order.optimize(once)
    tvm.ir.assert_structural_equal(once.main, twice.main)


def test_dump_is_called_after_each_phase(graph):
    seen = {}
    optimized = order.optimize(graph, lambda phase, result: seen.update({phase: result}))
    assert list(seen) == ["imported", "simplified", "fused", "folded"]
    assert seen["imported"] is graph
    assert seen["folded"] is optimized


def test_dump_to_writes_one_numbered_module_per_phase(graph, tmp_path):
    directory = tmp_path / "deep" / "ir"
    order.optimize(graph, order.dump_to(directory))
    files = sorted(path.name for path in directory.iterdir())
    assert files == ["1-imported.py", "2-simplified.py", "3-fused.py", "4-folded.py"]
    assert "R.matmul" in (directory / "1-imported.py").read_text()
    assert "bertile.dense" in (directory / "4-folded.py").read_text()


def test_each_pass_gives_a_well_formed_module(graph):
    for _, phase in order.PHASES:
        for apply in phase:
            graph = apply(graph)
            relax.analysis.well_formed(graph.mod)  # raises where it is not
