"""Models whose zeros are skipped: their numbers, their weights, and what their bundle says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers.planned import BF16, PLAIN, VNNI, compiled
from helpers.pruned_graphs import layers, pruned

from bertile import loader
from bertile.backends.cpu import builder, inspection, lowering, precision_plan
from bertile.cli import main
from bertile.config import Config
from bertile.export import cached
from bertile.graph import importer, order
from bertile.numerics.precision import LayerPlan
from bertile.schedules.cpu import SCHEDULES
from bertile.tune.log.chooser import Chooser
from bertile.tune.log.tuning_log import TuningLog

MODEL = "synthetic:bert-tiny@0.9:4x1"
SIZES = ((2, 21), (1, 70))


@pytest.fixture(scope="module")
def graph(exported):
    """The two-layer model with nine of ten blocks of 4 inputs zero."""
    return pruned(order.optimize(importer.import_onnx(exported)))


def both(graph, precision, row, tmp_path, exported, sizes=SIZES):
    """Pairs of an output of the dense and of the sparse kernels, for each size of request."""
    calls = []
    for sparse in ("off", "always"):
        planned = precision_plan.plan_layers(graph, precision, row, sparse=sparse)
        directory = tmp_path / sparse
        directory.mkdir()
        calls.append(compiled(planned, row, directory, exported))
    for size in sizes:
        yield list(zip(*(call(*size)[0] for call in calls), strict=True))


def assert_same_hidden_states(requests):
    """Bit for bit; the pooler behind them is in float32, whose sums have an order."""
    for (dense, sparse), *pooled in requests:
        np.testing.assert_array_equal(sparse, dense)
        assert all(np.abs(sparse - dense).max() < 1e-5 for dense, sparse in pooled)


def assert_close(requests, tolerance):
    """All outputs, relative to the largest of each."""
    for dense, sparse in (pair for pairs in requests for pair in pairs):
        assert np.abs(sparse - dense).max() <= tolerance * max(1.0, np.abs(dense).max())


def test_float32_is_that_of_the_dense_kernels(graph, exported, tmp_path):
    assert_close(both(graph, "fp32", PLAIN, tmp_path, exported), 1e-4)


@pytest.mark.parametrize("row", [BF16, PLAIN], ids=lambda row: row.name)
def test_int8_is_that_of_the_dense_kernels_bit_for_bit(graph, exported, tmp_path, row):
    """Sums of integers are exact in any order, and the epilogue is the same."""
    assert_same_hidden_states(both(graph, "int8", row, tmp_path, exported))


@pytest.mark.parametrize("static", [False, True])
def test_int8_with_smoothing_and_ranges_is_the_same_too(graph, exported, tmp_path, static):
    limits = {"low": -6.0, "high": 6.0} if static else {}
    rng = np.random.default_rng(0)
    plan = {
        name: LayerPlan(
            "int8",
            smooth=rng.uniform(0.8, 1.25, len(graph.params[name])).astype("float32"),
            **limits,
        )
        for name in layers(graph)
    }
    smoothed = dataclasses.replace(graph, plan=plan)
    assert_same_hidden_states(both(smoothed, "int8", VNNI, tmp_path, exported, SIZES[:1]))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 1e-4)])
def test_halves_are_near_to_the_dense_kernels(graph, exported, tmp_path, precision, tolerance):
    assert_close(both(graph, precision, BF16, tmp_path, exported), tolerance)


def test_layers_without_any_weight_left_and_without_any_zero(graph, exported, tmp_path):
    empty, full, *_ = layers(graph)
    rng = np.random.default_rng(0)
    shapes = {name: graph.params[name].shape for name in (empty, full)}
    weights = {empty: np.zeros(shapes[empty]), full: rng.standard_normal(shapes[full])}
    params = {**graph.params, **{name: w.astype("float32") for name, w in weights.items()}}
    changed = dataclasses.replace(graph, params=params)
    assert_same_hidden_states(both(changed, "int8", VNNI, tmp_path, exported, SIZES[:1]))


def test_work_is_the_multiply_adds_that_are_done(graph, tmp_path):
    planned = precision_plan.plan_layers(graph, "int8", VNNI, sparse="always")
    log = TuningLog([tmp_path / "empty"], print)
    built = builder.build(planned, Chooser(log, VNNI, print), VNNI, tmp_path / "lib.so")
    sparse = [kernel for kernel in built.kernels if kernel["operation"] == "sparse"]
    total = sum(kernel["nonzeros"] * kernel["calls"] for kernel in sparse)
    weights = [graph.params[name] for name in planned.plan if planned.plan[name].sparse.density]
    groups = [4 if planned.plan[n].precision == "int8" else 1 for n in planned.plan]
    lanes = [
        int((w.reshape(-1, group, w.shape[1]) != 0).any(1).sum())
        for w, group in zip(weights, groups, strict=True)
    ]
    assert sum(lanes) <= total <= 1.15 * sum(lanes)  # lists are padded to their neighbours'


def test_layers_that_share_weights_store_them_once(tmp_path):
    exported = cached.export_cached("synthetic:albert-tiny", Config())
    graph = pruned(order.optimize(importer.import_onnx(exported)))
    planned = precision_plan.plan_layers(graph, "int8", VNNI, sparse="always")

    def choose(task):
        return SCHEDULES[task.operation].default(task, VNNI)

    lowered = lowering.lower(planned, VNNI, choose)
    shared = [
        task for task in lowered.tasks if task.operation == "sparse" and lowered.tasks[task] > 1
    ]
    assert shared
    values = [name for name in lowered.params if "/values@" in name]
    names = {layer for layer, layer_plan in planned.plan.items() if layer_plan.sparse.density}
    assert (
        len(values)
        == len(names)
        < sum(lowered.tasks[t] for t in lowered.tasks if "density" in t.shape)
    )
    assert_same_hidden_states(both(graph, "int8", VNNI, tmp_path, exported, SIZES[:1]))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same pruned model, compiled with each of --sparse."""
    directory = tmp_path_factory.mktemp("bundles")
    for sparse in ("auto", "off", "always"):
        line = ["compile", MODEL, "--precision", "int8", "--sparse", sparse, "--threads", "1"]
        assert main.main([*line, "-q", "-o", str(directory / sparse)]) == 0
    return directory


def test_every_choice_gives_the_same_outputs(bundles):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (3, 37))
    answers = {}
    for path in bundles.iterdir():
        with loader.load(path) as model:
            answers[path.name] = model(input_ids=ids)
    for sparse in ("auto", "always"):
        dense, chosen = (answers[name]["last_hidden_state"] for name in ("off", sparse))
        np.testing.assert_array_equal(chosen, dense)


def test_zeros_are_not_stored(bundles):
    sizes = {path.name: (path / loader.WEIGHTS).stat().st_size for path in bundles.iterdir()}
    assert sizes["always"] < sizes["off"]


def test_inspect_says_where_the_zeros_lie(bundles, capsys):
    assert main.main(["inspect", str(bundles / "always"), "--sparse", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    pruned_rows = [row for row in rows if row["pattern"] == "4x1"]
    assert len(pruned_rows) == 8 and len(rows) == 9  # the pooler is not pruned
    assert {row["kernel"] for row in rows} == {"sparse"}
    assert all(row["lanes %"] == pytest.approx(10, abs=1) for row in pruned_rows)
    assert main.main(["inspect", str(bundles / "off"), "--sparse"]) == 0
    assert "compiled with --sparse off" in capsys.readouterr().out


def test_inspect_measures_sparse_kernels_by_what_they_do(bundles):
    report = inspection.inspect(bundles / "always", threads=1)
    rows = [row for row in report["kernels"] if row["kernel"].startswith("sparse")]
    assert rows and all(0 < row["peak %"] < 100 and 0 < row["bound %"] for row in rows)
    names = {
        kernel["name"]: kernel for kernel in loader.read_manifest(bundles / "always")["kernels"]
    }
    first = names[rows[0]["kernel"]]
    seconds = rows[0]["ms"] / 1e3 / first["calls"]
    lane = 4 if "precision" in first["shape"] else 1
    assert rows[0]["GFLOP/s"] == pytest.approx(
        2 * 128 * lane * first["nonzeros"] / seconds / 1e9, rel=0.01
    )
