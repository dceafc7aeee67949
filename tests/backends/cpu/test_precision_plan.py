"""Precision of every layer, the forms between them, and the numbers that come out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.planned import BF16, PLAIN, VNNI, compiled

from bertile.backends.cpu import precision_plan
from bertile.base.errors import PlatformError
from bertile.graph import importer, ops, order
from bertile.lower import layer_precisions
from bertile.lower.form import FP32, Form
from bertile.lower.forms import Forms
from bertile.lower.lowering import tasks
from bertile.numerics.precision import LayerPlan
from bertile.onnx.samples import session


@pytest.fixture(scope="module")
def graph(exported):
    return order.optimize(importer.import_onnx(exported))


def layers(graph):
    """(variable, call) of every dense layer."""
    flow = Forms(graph).flow
    return [(b.var, b.value) for b in flow.bindings if ops.is_call(b.value, "bertile.dense")]


def weight_name(call):
    return call.args[1].name


def test_float32_changes_nothing(graph):
    assert tasks(Forms(precision_plan.plan_layers(graph, "fp32", PLAIN))) == tasks(Forms(graph))


def test_bf16_needs_its_instructions(graph):
    with pytest.raises(PlatformError, match="x86-avx512-vnni has no bfloat16"):
        precision_plan.plan_layers(graph, "bf16", VNNI)


def test_int8_takes_every_layer_on_tokens(graph):
    planned = precision_plan.plan_layers(graph, "int8", PLAIN)
    precisions = {weight_name(call): ops.precision(call) for _, call in layers(planned)}
    by_tokens = {weight_name(c): Forms(graph).flow.is_tokens(c.args[0]) for _, c in layers(graph)}
    assert by_tokens and precisions == {
        name: "int8" if tokens else "fp32" for name, tokens in by_tokens.items()
    }
    rest = [planned.plan[name].why for name, tokens in by_tokens.items() if not tokens]
    assert rest and set(rest) == {layer_precisions.FEW_ROWS}


def test_a_layers_own_plan_counts_more_than_what_is_asked_for(graph):
    name = weight_name(layers(graph)[0][1])
    own = dataclasses.replace(graph, plan={name: LayerPlan("fp32", why="it hurts")})
    planned = precision_plan.plan_layers(own, "int8", PLAIN)
    precisions = {weight_name(call): ops.precision(call) for _, call in layers(planned)}
    assert precisions[name] == "fp32" and "int8" in precisions.values()
    assert planned.plan[name].why == "it hurts"


def test_a_layer_that_is_slower_in_int8_is_not_quantized(graph):
    """By a log in which one layer's int8 kernel has lost against its bf16 one."""
    planned = precision_plan.plan_layers(graph, "int8", BF16)
    forms = Forms(planned)
    var = next(v for v, c in layers(planned) if ops.precision(c) == "int8")
    slow = forms.task(var)

    class Log:
        def best(self, task, row):
            times = {"int8": 20.0, "bf16": 15.0, "fp32": 30.0}
            if {**task.shape, "precision": 0} == {**slow.shape, "precision": 0}:
                median = times[task.shape.get("precision", "fp32")]
                machine = {"cpu": "this" if task.shape.get("precision") in known else "another"}
                return SimpleNamespace(median=median, threads=1, estimated=False, machine=machine)
            return None

        def shares(self, task, other, row):
            return turns.get((task.shape.get("precision"), other.shape.get("precision")), {})

    turns = {}
    known = ["int8"]  # times of two processors cannot be compared
    again = precision_plan.plan_layers(graph, "int8", BF16, Log())
    assert {plan.precision for plan in again.plan.values()} <= {"int8", "fp32"}
    known = ["int8", "bf16"]
    again = precision_plan.plan_layers(graph, "int8", BF16, Log())
    same = [weight_name(c) for v, c in layers(planned) if forms.task(v) == slow]
    assert {again.plan[name].precision for name in same} == {"bf16"}
    why = "in bf16 it takes 0.75 of the time that it takes in int8"
    assert {again.plan[name].why for name in same} == {why}
    assert {p.precision for n, p in again.plan.items() if n not in same} <= {"int8", "fp32"}
    turns = {("bf16", "int8"): {16: 0.9, 128: 1.2}}  # what was measured in turns is believed before
    again = precision_plan.plan_layers(graph, "int8", BF16, Log())
    assert {again.plan[name].precision for name in same} == {"int8"}


def test_attention_multiplies_in_bf16_only_where_the_target_can(graph):
    def attention_precisions(row):
        planned = precision_plan.plan_layers(graph, "int8", row)
        calls = [b.value for b in Forms(planned).flow.bindings]
        return {ops.precision(c) for c in calls if ops.is_call(c, "bertile.attention")}

    assert attention_precisions(BF16) == {"bf16"}
    assert attention_precisions(VNNI) == {"fp32"}


def test_weights_are_bounded_where_bytes_are_not_multiplied_by_fours(graph):
    def precisions_of(graph, row):
        planned = precision_plan.plan_layers(graph, "int8", row)
        forms = Forms(planned)
        of_layers = {forms.task(var).shape.get("precision", "fp32") for var, _ in layers(planned)}
        return of_layers - {"fp32"}  # what runs on the first token

    assert precisions_of(graph, VNNI) == {"int8"}
    assert precisions_of(graph, PLAIN) == {"int8_bounded"}
    plan = {weight_name(c): LayerPlan("int8", low=-3.0, high=3.0) for _, c in layers(graph)}
    static = dataclasses.replace(graph, plan=plan)
    assert precisions_of(static, PLAIN) == {"int8_bounded_static"}
    # weights that were quantized before lose nothing
    params = dict(graph.params)
    name = next(iter(plan))
    w = params[name]
    params[name] = np.rint(w / np.abs(w).max(0) * 127) * (np.abs(w).max(0) / np.float32(127))
    again = dataclasses.replace(graph, params=params)
    assert precisions_of(again, VNNI) == {"int8"}
    assert precisions_of(again, PLAIN) == {"int8_bounded", "int8"}


def test_each_operator_writes_what_the_next_one_reads(graph):
    names = {task.name for task in tasks(Forms(precision_plan.plan_layers(graph, "bf16", BF16)))}
    assert any(n.startswith("dense") and "gelu_bf16_to_bf16" in n for n in names)
    assert any(n.startswith("dense") and "bf16_to_bf16_" in n for n in names)  # Q, K, V
    assert any(n.startswith("attention") and n.endswith("bf16_to_bf16") for n in names)
    assert any(n.startswith("layer_norm") and n.endswith("_bf16") for n in names)
    assert any(n.startswith("embedding") and n.endswith("_bf16") for n in names)


def test_a_static_range_is_written_by_whoever_computes_the_input(graph):
    plan = {weight_name(c): LayerPlan("int8", low=-3.0, high=3.0) for _, c in layers(graph)}
    static = dataclasses.replace(graph, plan=plan)
    names = {task.name for task in tasks(Forms(precision_plan.plan_layers(static, "int8", VNNI)))}
    assert any("gelu_int8_static_to_int8" in name for name in names)
    assert any(name.startswith("attention") and name.endswith("to_int8") for name in names)
    assert not any(name.startswith("narrow") for name in names)


def test_the_input_of_an_operator_depends_on_its_precision(graph):
    planned = Forms(precision_plan.plan_layers(graph, "int8", BF16))
    calls = [b.value for b in planned.flow.bindings if ops.is_ours(b.value)]
    attention = next(c for c in calls if ops.is_call(c, "bertile.attention"))
    dense = next(c for c in calls if ops.is_call(c, "bertile.dense"))
    q, k, _ = ops.attention_spec(attention).channels()
    assert planned.input(attention) == Form("qkv", values_from=q + k)
    assert planned.input(dense) == Form("int8")
    assert Forms(graph).input(layers(graph)[0][1]) == FP32


def run(graph, row, tmp_path, exported, batch=2, length=21):
    """Outputs of a graph beside those of ONNX Runtime."""
    outputs, arrays = compiled(graph, row, tmp_path, exported)(batch, length)
    want = session(exported.onnx_path).run(None, arrays)
    mask = arrays["attention_mask"]
    return [(f, w[mask > 0] if w.ndim == 3 else w) for f, w in zip(outputs, want)]


def cosine(a, b):
    a, b = a.reshape(-1).astype("float64"), b.reshape(-1).astype("float64")
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("precision", "row", "least"),
    [
        ("bf16", BF16, 0.9999),
        ("int8", BF16, 0.9995),
        ("int8", VNNI, 0.9995),
        ("int8", PLAIN, 0.999),  # bounded weights
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_model_is_close_to_float32(graph, exported, tmp_path, precision, row, least):
    planned = precision_plan.plan_layers(graph, precision, row)
    for output, want in run(planned, row, tmp_path, exported):
        assert cosine(output, want) > least


def test_layers_of_every_precision_work_side_by_side(graph, exported, tmp_path):
    names = [weight_name(call) for _, call in layers(graph)]
    kinds = [
        LayerPlan("int8"),
        LayerPlan("fp32"),
        LayerPlan("bf16"),
        LayerPlan("int8", low=-6.0, high=6.0),
    ]
    plan = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    mixed = precision_plan.plan_layers(dataclasses.replace(graph, plan=plan), "int8", BF16)
    for output, want in run(mixed, BF16, tmp_path, exported):
        assert cosine(output, want) > 0.999


def test_smoothing_keeps_the_function(graph, exported, tmp_path):
    """With ranges per token in the first layer of BERT's, fixed ones in the second."""
    rng = np.random.default_rng(0)
    names = [weight_name(call) for _, call in layers(graph)]
    plan = {
        name: LayerPlan(
            "int8",
            *((-8.0, 8.0) if place >= 4 else (None, None)),
            smooth=rng.uniform(0.8, 1.25, graph.params[name].shape[0]).astype("float32"),
        )
        for place, name in enumerate(names)
    }
    smoothed = precision_plan.plan_layers(dataclasses.replace(graph, plan=plan), "int8", VNNI)
    assert [smoothed.plan[name].static for name in names[:8]] == [False] * 4 + [True] * 4
    for output, want in run(smoothed, VNNI, tmp_path, exported):
        assert cosine(output, want) > 0.998
