"""What passes see of a graph, and what replacing leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from bertile.graph.rewriting.dataflow import (
    Dataflow,
    normalized,
    replace,
    rewrite,
    same_shape,
    shape,
)


def flow_of(graph, build, **kwargs):
    start = graph(build, **kwargs)
    return Dataflow(start.main), [b.var for b in start.main.body.blocks[0].bindings]


def test_definition_follows_plain_renamings(graph):
    start = graph(lambda emit, ids, x: op.nn.relu(x))
    relu = start.main.body.blocks[0].bindings[0].value
    first, second = (relax.DataflowVar(n, relu.ty) for n in "ab")
    result = relax.Var("c", relu.ty)
    bindings = [relax.VarBinding(first, relu), relax.VarBinding(second, first)]
    block = relax.DataflowBlock([*bindings, relax.VarBinding(result, second)])
    body = relax.SeqExpr([block], result)
    flow = Dataflow(relax.Function(start.main.params, body, relu.ty, True, start.main.attrs))
    assert flow.definition(result).same_as(relu)
    assert flow.call(second, "nn.relu").same_as(relu)
    assert flow.is_op(result, "tanh", "nn.relu") and not flow.is_op(result, "tanh")
    assert flow.definition(start.main.params[1]).same_as(start.main.params[1])


def test_uses_count_results_and_repeated_operands(graph):
    def build(emit, ids, x):
        once, twice = emit(op.nn.relu(x)), emit(op.tanh(x))
        total = emit(op.add(op.multiply(twice, twice), once))
        return relax.Tuple([total, op.nn.relu(total)])

    flow, (once, twice, _, total, *_) = flow_of(graph, build)
    assert flow.used_once(once)
    assert not flow.used_once(twice)
    assert not flow.used_once(total)  # a result, and an operand
    assert not flow.used_once(relax.const(1.0))


def test_weights_are_what_is_known_at_build_time(graph):
    def build(emit, ids, x, w):
        turned = emit(op.permute_dims(w))
        scaled = emit(op.multiply(turned, relax.const(2.0)))
        product, joined = emit(op.matmul(x, scaled)), emit(op.concat([turned, scaled], 0))
        return relax.Tuple([product, joined, emit(op.exp(w))])

    flow, (turned, scaled, product, joined, power, *_) = flow_of(
        graph, build, weights={"w": (8, 8)}
    )
    assert flow.is_weight(turned) and flow.is_weight(scaled) and flow.is_weight(joined)
    assert flow.is_weight(relax.const(1.0))
    assert not flow.is_weight(product)
    assert not flow.is_weight(power)  # nobody evaluates it at build time
    assert not any(flow.is_weight(param) for param in flow.main.params[:3])


def test_tokens_have_the_axes_of_the_request(graph):
    activations = {
        "x": ("batch", "length", 8),
        "turned": ("length", "batch", 8),
        "rows": ("batch", 8),
        "heads": ("batch", 2, "length", 4),
        "other": ("batch", 5, 8),
    }
    flow, _ = flow_of(
        graph, lambda emit, ids, *tensors: op.nn.relu(tensors[0]), activations=activations
    )
    named = {param.name: param for param in flow.main.params}
    assert [name for name in activations if flow.is_tokens(named[name])] == ["x"]
    assert [n for n in activations if flow.is_row_batch(named[n])] == ["x", "rows"]


def test_split_scalar_finds_the_constant_on_either_side(graph):
    def build(emit, ids, x):
        left, right = op.multiply(relax.const(3.0), x), op.multiply(x, relax.const([[4.0]]))
        return relax.Tuple([emit(left), emit(right), emit(op.multiply(x, x))])

    flow, (left, right, neither, *_) = flow_of(graph, build)
    x = flow.main.params[1]
    for var, number in ((left, 3.0), (right, 4.0)):
        operand, constant = flow.split_scalar(flow.call(var, "multiply"))
        assert operand.same_as(x) and constant == number
    assert flow.split_scalar(flow.call(neither, "multiply")) is None
    assert flow.scalar(relax.const(np.zeros(2))) is None


def test_rule_sees_the_graph_as_it_was(graph):
    seen = []

    def rule(flow, call):
        seen.append(call.op.name)
        return op.tanh(call.args[0]) if flow.is_op(call, "nn.relu") else None

    start = graph(lambda emit, ids, x: op.nn.relu(op.nn.relu(x)))
    tvm.ir.assert_structural_equal(
        rewrite(start, rule).main, graph(lambda emit, ids, x: op.tanh(op.tanh(x))).main
    )
    assert seen == ["relax.nn.relu", "relax.nn.relu"]


def test_rewriting_without_a_match_gives_the_same_graph(graph):
    start = graph(lambda emit, ids, x: op.nn.relu(x))
    assert rewrite(start, lambda flow, call: None) is start


def test_replacing_drops_what_is_no_longer_read(becomes):
    def apply(graph):
        *_, last = graph.main.body.blocks[0].bindings
        return replace(graph, {last.var: op.tanh(graph.main.params[1])})

    becomes(
        apply,
        lambda emit, ids, x: op.add(op.nn.relu(x), op.nn.silu(x)),
        lambda emit, ids, x: op.tanh(x),
    )


def test_normalizing_flattens_nested_calls(graph):
    start = graph(lambda emit, ids, x: op.nn.relu(x))
    (binding,) = start.main.body.blocks[0].bindings
    nested = relax.VarBinding(binding.var, op.tanh(op.tanh(start.main.params[1])))
    body = relax.SeqExpr([relax.DataflowBlock([nested])], start.main.body.body)
    attrs = start.main.attrs
    main = normalized(relax.Function(start.main.params, body, start.main.ret_ty, True, attrs))
    assert len(main.body.blocks[0].bindings) == 2
    assert int(main.attrs["num_input"]) == 3


@pytest.mark.parametrize("extents", [(2, 3), ("batch", 3), ()], ids=str)
def test_shape_gives_numbers_where_they_are_known(graph, extents):
    start = graph(lambda emit, ids, x: x, activations={"x": extents})
    known = shape(start.main.params[1])
    assert [isinstance(e, int) for e in known] == [isinstance(e, int) for e in extents]
    assert [e for e in known if isinstance(e, int)] == [e for e in extents if e != "batch"]


def test_shape_is_none_where_it_is_unknown():
    assert shape(relax.Var("x", relax.TensorType(dtype="float32", ndim=2))) is None


def test_same_shape_needs_proof(graph):
    shapes = {"a": ("batch", 3), "b": ("batch", 3), "c": ("length", 3), "d": (1, 3)}
    start = graph(lambda emit, ids, a, b, c, d: a, activations=shapes)
    a, b, c, d = start.main.params[1:5]
    assert same_shape(a, b)
    assert not same_shape(a, c) and not same_shape(a, d)
