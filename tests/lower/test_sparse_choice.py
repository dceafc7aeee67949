"""Which layers skip the zeros of their weights, why, and what a bundle says of it."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.pruned_graphs import layers, pruned

from bertile.backends.cpu import precision_plan
from bertile.graph import importer, ops, order
from bertile.lower import lowering, sparse_choice
from bertile.lower.forms import Forms
from bertile.lower.sparse_choice import SparseChoice, rounded, sparse_task
from bertile.lower.sparse_costs import relative_time
from bertile.numerics.precision import LayerPlan
from bertile.schedules.task import Task
from bertile.targets.rows import resolve
from bertile.tune.log.tuning_log import Record

ROW = resolve("x86-avx512-vnni", threads=2)


@pytest.fixture(scope="module")
def graph(exported):
    return order.optimize(importer.import_onnx(exported))


def kernels(graph):
    """The operation and density of each linear layer's task."""
    forms = Forms(graph)
    tasks = [forms.task(b.var) for b in forms.flow.bindings if ops.is_ours(b.value)]
    return {(t.operation, t.shape.get("density")) for t in tasks if "inputs" in t.shape}


def record(task, microseconds, threads=2, **also):
    """A record of 128 tokens; `also` are those of other numbers of tokens, as tokens16=3.0."""
    return Record(
        task.operation,
        task.shape,
        *("x86-avx512", threads, 128, {}, (microseconds,), {}, {}, ""),
        also={tokens.removeprefix("tokens"): (time,) for tokens, time in also.items()},
    )


class Log:
    """A log in which every dense task has taken 100 us, and sparse ones what is given."""

    def __init__(self, sparse, threads=2, **also):
        self.sparse, self.threads, self.also, self.asked = sparse, threads, also, []

    def best(self, task, row):
        self.asked.append(task)
        if task.operation == "dense":
            return record(task, 100.0, **dict.fromkeys(self.also, 100.0))
        return record(task, self.sparse, self.threads, **self.also)

    def shares(self, task, other, row):
        return {}


def test_attributes_of_a_call_survive_each_other(graph):
    flow = Forms(graph).flow
    call = next(b.value for b in flow.bindings if ops.is_call(b.value, "bertile.dense"))
    both = ops.with_precision(ops.with_density(call, 10), "int8")
    assert (ops.density(both), ops.precision(both)) == (10, "int8")
    assert both.attrs["activation"] == call.attrs["activation"]
    assert ops.density(call) is None and ops.density(ops.with_density(both, 5)) == 5


def test_a_weight_without_zeros_stays_dense(graph):
    planned = precision_plan.plan_layers(graph, "int8", ROW, sparse="auto")
    plain = precision_plan.plan_layers(graph, "int8", ROW)
    assert lowering.tasks(Forms(planned)) == lowering.tasks(Forms(plain))
    assert {layer_plan.sparse.pattern for layer_plan in planned.plan.values()} == {"dense"}


@pytest.mark.parametrize(
    ("precision", "group", "density"),
    [("int8", 4, 10), ("fp32", 4, 10), ("fp32", 1, 10), ("int8", 1, 40), ("bf16", 1, 20)],
)
def test_density_counts_the_lanes_of_the_layers_precision(graph, precision, group, density):
    row = resolve("x86-avx512-bf16", threads=2)
    planned = precision_plan.plan_layers(pruned(graph, 0.9, group), precision, row, sparse="always")
    plans = {planned.plan[name].sparse for name in layers(graph)}
    assert {zeros.pattern for zeros in plans} == {"4x1" if group == 4 else "unstructured"}
    assert {zeros.density for zeros in plans} == {density}
    assert ("sparse", density) in kernels(planned)


def test_off_looks_at_nothing(graph):
    planned = precision_plan.plan_layers(pruned(graph), "int8", ROW, Log(1.0), sparse="off")
    assert {operation for operation, _ in kernels(planned)} == {"dense"}
    assert sparse_choice.report(planned.plan) == []


@pytest.mark.parametrize(("sparse", "operation"), [(94.0, "sparse"), (96.0, "dense")])
def test_measured_times_decide(graph, sparse, operation):
    planned = precision_plan.plan_layers(pruned(graph), "int8", ROW, Log(sparse), sparse="auto")
    chosen = [planned.plan[name].sparse for name in layers(graph)]
    assert {zeros.density for zeros in chosen} == {10 if operation == "sparse" else None}
    why = f"measured: sparse {sparse:.0f} us, dense 100 (128 tokens)"
    assert {zeros.why for zeros in chosen} == {why}


def test_a_kernel_that_is_slower_for_short_requests_is_not_chosen(graph):
    arguments = (pruned(graph), "int8", ROW)
    planned = precision_plan.plan_layers(
        *arguments, Log(50.0, tokens16=120.0, tokens384=40.0), sparse="auto"
    )
    chosen = {planned.plan[name].sparse for name in layers(graph)}
    assert {zeros.density for zeros in chosen} == {None}
    assert {zeros.why for zeros in chosen} == {"measured: sparse 120 us, dense 100 (16 tokens)"}


@pytest.mark.parametrize(("worst", "density"), [(0.94, 10), (0.96, None)])
def test_what_was_measured_in_turns_decides_before_times(graph, monkeypatch, worst, density):
    """By the number of tokens where the sparse kernel gains least."""
    monkeypatch.setattr(Log, "shares", lambda *_: {16: 0.5, 128: worst, 384: 0.7})
    planned = precision_plan.plan_layers(pruned(graph), "int8", ROW, Log(200.0), sparse="auto")
    chosen = [planned.plan[name].sparse for name in layers(graph)]
    assert {zeros.density for zeros in chosen} == {density}
    why = f"measured in turns: sparse takes {worst} of the dense kernel's time (128 tokens)"
    assert {zeros.why for zeros in chosen} == {why}


def test_times_on_other_threads_are_not_compared(graph):
    arguments = (pruned(graph), "int8", ROW)
    planned = precision_plan.plan_layers(*arguments, Log(1.0, threads=1), sparse="auto")
    assert all("estimated" in planned.plan[name].sparse.why for name in layers(graph))


def test_without_a_log_the_cost_model_decides(graph):
    """By a share of zeros that gains, and by one that does not."""
    for share, operation in ((0.95, "sparse"), (0.3, "dense")):
        planned = precision_plan.plan_layers(pruned(graph, share), "fp32", ROW, sparse="auto")
        wide = [n for n in layers(graph) if graph.params[n].shape[0] == 512]
        assert wide and all("estimated" in planned.plan[n].sparse.why for n in wide)
        skipped = {planned.plan[name].sparse.density is not None for name in wide}
        assert skipped == {operation == "sparse"}


def test_a_layer_that_is_kept_in_float32_skips_its_zeros_there(graph):
    first, *rest = layers(graph)
    kept = dataclasses.replace(pruned(graph), plan={first: LayerPlan("fp32", why="it hurts")})
    planned = precision_plan.plan_layers(kept, "int8", ROW, Log(50.0), sparse="auto").plan
    assert (planned[first].precision, planned[first].why) == ("fp32", "it hurts")
    assert planned[first].sparse.density == planned[rest[0]].sparse.density == 10
    assert planned[rest[0]].precision == "int8"


def test_layers_that_share_a_weight_get_one_kernel(graph):
    names = layers(graph)
    task = Task("dense", {"inputs": 128, "outputs": 128, "activation": "none", "residual": False})
    other = Task("dense", {**task.shape, "residual": True})
    log = Log(50.0)
    choice = SparseChoice(pruned(graph).params, ROW, log, "auto")
    assert choice.plan(names[0], [task, other]).density == 10
    assert {sparse_task(task, 10), sparse_task(other, 10), task, other} == set(log.asked)


def test_density_goes_up_to_the_next_that_is_known():
    assert [rounded(share) for share in (0.0, 0.01, 0.1, 0.1002, 0.12, 0.34, 1.0)] == [
        *(1, 1, 10, 10),
        *(15, 40, 100),
    ]


def test_a_layer_that_is_slower_in_int8_alone_is_quantized_where_its_zeros_are_skipped(graph):
    """The int8 kernel has lost against the bf16 one, but not where it skips nine lanes of ten."""
    row = resolve("x86-avx512-bf16", threads=2)

    class Slow(Log):
        def best(self, task, row):
            times = {"int8": 100.0, "bf16": 80.0, "fp32": 300.0}
            if task.operation == "sparse":
                times = {"int8": 50.0, "bf16": 70.0, "fp32": 90.0}
            return record(task, times[task.shape.get("precision", "fp32")])

    def precisions(sparse):
        planned = precision_plan.plan_layers(pruned(graph, 0.95), "int8", row, Slow(0.0), sparse)
        return {planned.plan[name].precision for name in layers(graph)}

    assert precisions("off") == {"bf16"}
    assert precisions("auto") == {"int8"}


def test_the_cost_model_grows_with_density_and_falls_with_depth():
    def cost(density, inputs):
        shape = {"inputs": inputs, "outputs": 768, "activation": "none", "residual": False}
        return relative_time(Task("sparse", {**shape, "precision": "int8", "density": density}))

    assert cost(1, 768) < cost(10, 768) < cost(30, 768) < cost(100, 768)
    assert cost(10, 3072) < cost(10, 768) < cost(10, 128)
    assert cost(100, 768) > 1


def test_the_cost_model_knows_of_dense_kernels_that_multiply_tiles():
    """A model of 80% zeros took its largest layer in bf16, whose dense kernel is nine times as fast
    by tiles.
    """
    shape = {"inputs": 768, "outputs": 2304, "activation": "none", "residual": False}
    for precision, least in (("bf16", 3), ("int8", 0.9), ("int8_static", 0.9), ("fp32", 0)):
        task = Task("sparse", {**shape, "precision": precision, "density": 20})
        by_tiles, by_vectors = (
            relative_time(task, resolve(name)) for name in ("x86-amx", "x86-avx512-bf16")
        )
        assert by_tiles > least
        assert by_vectors == relative_time(task) < 0.5
        assert (by_tiles > by_vectors) == (precision != "fp32")


def test_the_cost_model_knows_of_dense_kernels_that_multiply_matrices():
    shape = {"inputs": 768, "outputs": 768, "activation": "none", "residual": False}
    for precision, shares in (("int8", {"arm-a76": 1, "arm-v1": 2}), ("fp32", {"arm-v1": 1})):
        task = Task("sparse", {**shape, "precision": precision, "density": 10})
        for name, times in shares.items():
            assert relative_time(task, resolve(name)) == times * relative_time(task)


def test_report_says_pattern_density_and_choice_of_every_layer(graph):
    some = layers(graph)[:1]
    planned = precision_plan.plan_layers(
        pruned(graph, names=some), "int8", ROW, Log(50.0), sparse="auto"
    )
    rows = {row["layer"]: row for row in sparse_choice.report(planned.plan)}
    assert set(rows) == set(planned.plan)
    first = rows[some[0]]
    assert (first["pattern"], first["kernel"], first["precision"]) == ("4x1", "sparse", "int8")
    assert first["zeros %"] == pytest.approx(90, abs=2)
    assert first["lanes %"] == pytest.approx(10, abs=2)
    assert first["why"] == "measured: sparse 50 us, dense 100 (128 tokens)"
    other = rows[layers(graph)[1]]
    assert (other["pattern"], other["kernel"], other["why"]) == ("dense", "dense", None)
    text = sparse_choice.as_text(list(rows.values()), "auto")
    assert (
        text.splitlines()[0].split() == "layer precision pattern zeros % lanes % kernel why".split()
    )
    assert "--sparse off" in sparse_choice.as_text([], "off")
