"""Expressions of weights alone are evaluated once; what nobody reads is dropped."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fold_weights import fold_weights, joined

batch, length = TypeVar("batch"), TypeVar("length")

WEIGHTS = {
    "wq": np.array([[1, 2], [3, 4]], "float32"),
    "wk": np.array([[5], [6]], "float32"),
}
FOLDED = {"wq_wk": np.array([[1, 2, 5], [3, 4, 6]], "float32")}


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        wq: R.Tensor((2, 2), "float32"),
        wk: R.Tensor((2, 1), "float32"),
    ):
        R.func_attr({"num_input": 2})  # then weights
        return R.matmul(x, R.concat([wq, wk], axis=1))


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 2), "float32"),
        wq_wk: R.Tensor((2, 3), "float32"),
    ):
        R.func_attr({"num_input": 2})
        return R.matmul(x, wq_wk)


def test_weights_are_joined_once(becomes):
    becomes(fold_weights, Before, After, values=(WEIGHTS, FOLDED))


PAIR = {"a": (8, 6), "b": (8, 6)}

CASES = {
    "permutation": (lambda a, b: op.permute_dims(a), lambda a, b: a.T),
    "permutation by axes": (lambda a, b: op.permute_dims(b, [1, 0]), lambda a, b: b.T),
    "reshape": (lambda a, b: op.reshape(a, (6, 8)), lambda a, b: a.reshape(6, 8)),
    "expand": (lambda a, b: op.expand_dims(a, [0]), lambda a, b: a[None]),
    "squeeze": (lambda a, b: op.squeeze(op.expand_dims(a, [0]), [0]), lambda a, b: a),
    "sum": (lambda a, b: op.add(a, b), lambda a, b: a + b),
    "difference and quotient": (
        lambda a, b: op.divide(op.subtract(a, b), b),
        lambda a, b: (a - b) / b,
    ),
    "product with a constant": (
        lambda a, b: op.multiply(a, relax.const(2.0, "float32")),
        lambda a, b: a * 2,
    ),
    "several steps": (
        lambda a, b: op.permute_dims(op.concat([a, op.add(a, b)], axis=0)),
        lambda a, b: np.concatenate([a, a + b]).T,
    ),
}


@pytest.mark.parametrize("expression,numpy", CASES.values(), ids=CASES)
def test_expression_of_weights_becomes_a_weight(graph, expression, numpy):
    before = graph(lambda emit, ids, x, a, b: relax.Tuple([x, expression(a, b)]), weights=PAIR)
    after = fold_weights(before)
    (folded,) = after.params.values()
    assert folded.dtype == np.float32 and folded.flags.c_contiguous
    assert np.array_equal(folded, numpy(*before.params.values()))
    assert [p.name for p in after.main.params[3:]] == list(after.params)
    (block,) = after.main.body.blocks
    assert not any(isinstance(b.value, relax.Call) for b in block.bindings)


def test_weights_in_the_order_of_their_parameters(graph):
    def build(emit, ids, x, w1, b1, w2, b2):
        y = emit(ops.dense(x, op.permute_dims(w1), b1))
        return ops.dense(y, op.permute_dims(w2), b2)

    weights = {"w1": (6, 8), "b1": (6,), "w2": (8, 6), "b2": (8,)}
    before = graph(build, weights=weights)
    after = fold_weights(before)
    assert [p.name for p in after.main.params[3:]] == list(after.params)
    for var in after.main.params[3:]:
        assert tuple(int(e) for e in var.ty.shape) == after.params[var.name].shape
    first, second = (b.value for b in after.main.body.blocks[0].bindings[:2])
    assert np.array_equal(after.params[first.args[1].name], before.params["w1"].T)
    assert np.array_equal(after.params[second.args[1].name], before.params["w2"].T)


def test_equal_names_do_not_meet(graph):
    """Each pass names its variables lv, lv1 … anew: two of them may be called the same."""
    before = graph(
        lambda emit, ids, x, a, b: relax.Tuple([x, op.permute_dims(a), op.permute_dims(b)]),
        weights=PAIR,
    )
    (block,) = before.main.body.blocks
    renamed, bindings = {}, []
    for binding in block.bindings[:2]:
        renamed[binding.var] = relax.DataflowVar("lv", binding.var.ty)
        bindings.append(relax.VarBinding(renamed[binding.var], binding.value))
    result = block.bindings[2]
    fields = [renamed.get(field, field) for field in result.value.fields]
    bindings.append(relax.VarBinding(result.var, relax.Tuple(fields)))
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], before.main.body.body)
    main = relax.Function(before.main.params, body, before.main.ret_ty, True, before.main.attrs)
    after = fold_weights(before.with_main(main))
    values = sorted(after.params.values(), key=lambda value: value.sum())
    expected = sorted((v.T for v in before.params.values()), key=lambda value: value.sum())
    assert len(values) == 2
    assert all(np.array_equal(a, b) for a, b in zip(values, expected))


def test_weight_that_is_read_as_it_is_stays_too(graph):
    before = graph(
        lambda emit, ids, x, w, b: relax.Tuple(
            [ops.dense(x, w, b), op.matmul(x, op.permute_dims(op.permute_dims(w)))]
        ),
        weights={"w": (8, 8), "b": (8,)},
    )
    after = fold_weights(before)
    assert {"w", "b"} < set(after.params)
    assert len(after.params) == 3


def test_unread_weight_is_dropped(graph):
    after = fold_weights(graph(lambda emit, ids, x, a, b: op.matmul(x, b), weights=PAIR))
    assert list(after.params) == ["b"]
    assert [p.name for p in after.main.params] == ["input_ids", "x", "blocks", "b"]


def test_request_and_block_table_stay_when_nobody_reads_them(graph):
    after = fold_weights(graph(lambda emit, ids, x, a, b: op.matmul(x, a), weights=PAIR))
    assert [p.name for p in after.main.params[:3]] == ["input_ids", "x", "blocks"]
    assert int(after.main.attrs["num_input"]) == 3


def test_expression_of_activations_is_left_alone(leaves_alone):
    leaves_alone(
        fold_weights, lambda emit, ids, x: op.add(op.permute_dims(x, [0, 2, 1]), relax.const(1.0))
    )


def test_operator_without_a_rule_stays_in_the_graph(graph):
    before = graph(lambda emit, ids, x, a, b: op.matmul(x, op.tanh(a)), weights=PAIR)
    after = fold_weights(before)
    assert list(after.params) == ["a"]
    names = [b.value.op.name for b in after.main.body.blocks[0].bindings]
    assert names == ["relax.tanh", "relax.matmul"]


def test_folding_twice_changes_nothing(graph):
    def build(emit, ids, x, a, b):
        return op.matmul(x, op.concat([a, b], axis=1))

    once = fold_weights(graph(build, weights=PAIR))
    twice = fold_weights(once)
    tvm.ir.assert_structural_equal(once.main, twice.main)
    assert once.params.keys() == twice.params.keys()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["l.0.self.query.weight", "l.0.self.key.weight"], "l.0.self.query_key.weight"),
        (["l.0.dense.weight"], "l.0.dense.weight"),
        (["a", "b", "c"], "a_b_c"),
        (["q.weight", "attn.k.weight"], "q_attn.k.weight"),
        ([], ""),
    ],
)
def test_name_says_what_was_joined(names, wanted):
    assert joined(names) == wanted


def test_folded_weight_is_named_after_what_it_was_made_of(graph):
    def build(emit, ids, x, a, b):
        return relax.Tuple([x, op.concat([a, b], axis=1), op.permute_dims(a)])

    names = {"l.q.weight": (8, 6), "l.k.weight": (8, 6)}
    assert list(fold_weights(graph(build, weights=names)).params) == [
        "l.q_k.weight",
        "l.q.weight_folded",
    ]
