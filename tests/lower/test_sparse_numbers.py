"""Models whose zeros are skipped: their numbers, their weights, and what their bundle says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from helpers import observers, programs
from helpers.planned import BF16, PLAIN, VNNI, compiled
from helpers.pruned_graphs import layers, pruned

from bertile import loader
from bertile.backends.cpu import inspection, precision_plan
from bertile.cli import main
from bertile.graph import importer, order
from bertile.numerics.precision import LayerPlan

MODEL = "synthetic:bert-tiny@0.9:4x1"
SIZES = ((2, 21), (1, 70))


@pytest.fixture(scope="module")
def graph(exported):
    """The two-layer model with nine of ten blocks of 4 inputs zero."""
    return pruned(order.optimize(importer.import_onnx(exported)))


def pair(graph, precision, row, directory, exported):
    """The graph planned for sparse kernels, and compiled with dense and with sparse ones."""
    calls = []
    for sparse in ("off", "always"):
        planned = precision_plan.plan_layers(graph, precision, row, sparse=sparse)
        (directory / sparse).mkdir()
        calls.append(compiled(planned, row, directory / sparse, exported))
    return planned, calls


def outputs(calls, sizes=SIZES):
    """Pairs of an output of the dense and of the sparse kernels, for each size of request."""
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


def test_float32_and_fp16_are_near_to_the_dense_kernels(graph, exported, tmp_path):
    """A layer of BERT's in each: both multiply in float32."""
    names = layers(graph)
    plan = {name: LayerPlan(("fp32", "fp16")[place // 4]) for place, name in enumerate(names)}
    mixed = dataclasses.replace(graph, plan=plan)
    planned, calls = pair(mixed, "fp32", PLAIN, tmp_path, exported)
    assert [planned.plan[name].precision for name in names] == ["fp32"] * 4 + ["fp16"] * 4
    assert_close(outputs(calls), 1e-4)


def test_bf16_is_near_to_the_dense_kernels(graph, exported, tmp_path):
    assert_close(outputs(pair(graph, "bf16", BF16, tmp_path, exported)[1]), 0.02)


@pytest.fixture(
    scope="module",
    params=[BF16, pytest.param(VNNI, marks=pytest.mark.slow)],
    ids=lambda row: row.name,
)
def int8(request, graph, exported, tmp_path_factory):
    return pair(graph, "int8", request.param, tmp_path_factory.mktemp("int8"), exported)


def test_int8_is_that_of_the_dense_kernels_bit_for_bit(int8):
    """Sums of integers are exact in any order, and the epilogue is the same."""
    assert_same_hidden_states(outputs(int8[1]))


@pytest.mark.slow
def test_int8_is_near_to_dense_kernels_of_bounded_weights(graph, exported, tmp_path):
    """Without VNNI only dense weights are rounded so that products can be summed in 16 bits."""
    assert_close(outputs(pair(graph, "int8", PLAIN, tmp_path, exported)[1]), 0.1)


def test_int8_work_is_the_multiply_adds_that_are_done(graph, int8):
    planned, (_, call) = int8
    sparse = [kernel for kernel in call.built.kernels if kernel["operation"] == "sparse"]
    total = sum(kernel["nonzeros"] * kernel["calls"] for kernel in sparse)
    weights = [graph.params[name] for name in planned.plan if planned.plan[name].sparse.density]
    groups = [4 if planned.plan[n].precision == "int8" else 1 for n in planned.plan]
    lanes = [
        int((w.reshape(-1, group, w.shape[1]) != 0).any(1).sum())
        for w, group in zip(weights, groups, strict=True)
    ]
    assert sum(lanes) <= total <= 1.15 * sum(lanes)  # lists are padded to their neighbours'


@pytest.mark.slow
def test_int8_with_smoothing_and_ranges_is_the_same_too(graph, exported, tmp_path):
    """Ranges per token in the first layer of BERT's, fixed ones in the second."""
    rng = np.random.default_rng(0)
    plan = {
        name: LayerPlan(
            "int8",
            *((-6.0, 6.0) if place >= 4 else (None, None)),
            smooth=rng.uniform(0.8, 1.25, len(graph.params[name])).astype("float32"),
        )
        for place, name in enumerate(layers(graph))
    }
    smoothed = dataclasses.replace(graph, plan=plan)
    _, calls = pair(smoothed, "int8", VNNI, tmp_path, exported)
    kernels = [k for k in calls[1].built.kernels if k["operation"] == "sparse"]
    precisions = [kernel["shape"].get("precision") for kernel in kernels]
    assert precisions.count("int8") == precisions.count("int8_static") == 4
    assert_same_hidden_states(outputs(calls, SIZES[:1]))


def small(body, directory):
    """A graph of 8 channels with half of the blocks of 4 inputs zero, and its export."""
    exported = programs.exported_of(body, directory)
    return pruned(order.optimize(importer.import_onnx(exported)), 0.5), exported


def test_layers_without_any_weight_left_and_without_any_zero(tmp_path):
    body = "e = MatMul(x, w3) h = MatMul(x, w1) z = MatMul(h, w2) y = Add(z, e)"
    graph, exported = small(body, tmp_path)
    params = dict(graph.params)
    empty, full = (
        n for shape in ((8, 8), (8, 32)) for n in layers(graph) if params[n].shape == shape
    )
    params[empty] = np.zeros((8, 8), "float32")
    params[full] = np.random.default_rng(0).standard_normal((8, 32)).astype("float32")
    changed = dataclasses.replace(graph, params=params)
    _, calls = pair(changed, "int8", VNNI, tmp_path, exported)
    kernels = [k for k in calls[1].built.kernels if k["operation"] == "sparse"]
    assert len(kernels) == 3
    assert_same_hidden_states(outputs(calls))


def test_layers_that_share_weights_store_them_once(tmp_path):
    graph, exported = small("h = MatMul(x, w3) y = MatMul(h, w3)", tmp_path)
    _, calls = pair(graph, "int8", VNNI, tmp_path, exported)
    (kernel,) = (k for k in calls[1].built.kernels if k["operation"] == "sparse")
    assert kernel["calls"] == 2
    assert len([name for name in calls[1].built.params if "/values@" in name]) == 1
    assert_same_hidden_states(outputs(calls))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, stages):
    """A pruned model, compiled with --sparse always."""
    with observers.built_once():
        return compile_as("always", tmp_path_factory.mktemp("bundles"), stages)


@pytest.fixture(scope="module")
def dense_bundle(bundle, stages):
    """The same model, compiled with --sparse off."""
    with observers.built_once():
        return compile_as("off", bundle.parent, stages)


def compile_as(sparse, directory, stages):
    line = ["compile", MODEL, "--precision", "int8", "--threads", "1", "--cache-dir", stages, "-q"]
    assert main.main([*line, "--sparse", sparse, "-o", str(directory / sparse)]) == 0
    return directory / sparse


def answer(path):
    ids = np.random.default_rng(0).integers(0, 1000, (3, 37))
    with loader.load(path) as model:
        return model(input_ids=ids)["last_hidden_state"]


@pytest.mark.slow
def test_zeros_that_are_skipped_change_no_output(bundle, dense_bundle):
    np.testing.assert_array_equal(answer(bundle), answer(dense_bundle))


@pytest.mark.slow
def test_zeros_that_are_skipped_where_that_is_faster_change_no_output(
    dense_bundle, tmp_path, stages
):
    chosen = compile_as("auto", tmp_path, stages)
    np.testing.assert_array_equal(answer(chosen), answer(dense_bundle))


@pytest.mark.slow
def test_zeros_are_not_stored(bundle, dense_bundle):
    sizes = [(path / loader.WEIGHTS).stat().st_size for path in (bundle, dense_bundle)]
    assert sizes[0] < sizes[1]


def test_inspect_says_where_the_zeros_lie(bundle, capsys):
    assert main.main(["inspect", str(bundle), "--sparse", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    pruned_rows = [row for row in rows if row["pattern"] == "4x1"]
    assert len(pruned_rows) == 8 and len(rows) == 9  # the pooler is not pruned
    assert {row["kernel"] for row in rows} == {"sparse"}
    assert all(row["lanes %"] == pytest.approx(10, abs=1) for row in pruned_rows)


@pytest.mark.slow
def test_inspect_says_that_no_zeros_are_skipped(dense_bundle, capsys):
    assert main.main(["inspect", str(dense_bundle), "--sparse"]) == 0
    assert "compiled with --sparse off" in capsys.readouterr().out


def test_inspect_measures_sparse_kernels_by_what_they_do(bundle):
    report = inspection.inspect(bundle, threads=1)
    rows = [row for row in report["kernels"] if row["kernel"].startswith("sparse")]
    assert rows and all(0 < row["peak %"] < 100 and 0 < row["bound %"] for row in rows)
    names = {kernel["name"]: kernel for kernel in loader.read_manifest(bundle)["kernels"]}
    first = names[rows[0]["kernel"]]
    seconds = rows[0]["ms"] / 1e3 / first["calls"]
    lane = 4 if "precision" in first["shape"] else 1
    assert rows[0]["GFLOP/s"] == pytest.approx(
        2 * 128 * lane * first["nonzeros"] / seconds / 1e9, rel=0.01
    )


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 3), (1e9, 20)])
def test_inspect_of_a_slow_request_makes_few_calls(bundle, monkeypatch, seconds, runs):
    counts = []
    monkeypatch.setattr(inspection, "SECONDS", seconds)
    monkeypatch.setattr(inspection, "_typical", lambda times, count: counts.append(count) or 1.0)
    inspection.inspect(bundle, threads=1)
    assert set(counts) == {runs}
