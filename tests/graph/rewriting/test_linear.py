"""What counts as a linear layer."""

from __future__ import annotations

import numpy as np
from tvm.relax import op

from bertile.graph.rewriting.dataflow import Dataflow
from bertile.graph.rewriting.linear import linear


def last_of(graph, build, **kwargs):
    main = graph(build, **kwargs).main
    return linear(Dataflow(main), main.body.blocks[0].bindings[-1].var), main.params


WEIGHTS = {"w": (8, 6), "b": (6,)}


def test_product_with_bias_is_a_layer(graph):
    for build in (
        lambda emit, ids, x, w, b: op.add(op.matmul(x, w), b),
        lambda emit, ids, x, w, b: op.add(b, op.matmul(x, w)),
    ):
        layer, (_, x, _, w, b) = last_of(graph, build, weights=WEIGHTS)
        assert layer.x.same_as(x) and layer.w.same_as(w) and layer.b.same_as(b)
        assert layer.bias().same_as(b)


def test_product_alone_has_a_bias_of_zeros(graph):
    layer, _ = last_of(graph, lambda emit, ids, x, w: op.matmul(x, w), weights={"w": (8, 6)})
    assert layer.b is None
    assert np.array_equal(layer.bias().value.numpy(), np.zeros(6, "float32"))


def test_other_expressions_are_no_layer(graph):
    for build, weights in (
        (lambda emit, ids, x, w: op.nn.relu(op.matmul(x, w)), {"w": (8, 6)}),
        (lambda emit, ids, x: op.nn.relu(x), {}),
        (lambda emit, ids, x, b: op.add(x, b), {"b": (8,)}),
        (lambda emit, ids, x, v, w: op.matmul(v, w), {"v": (4, 8), "w": (8, 6)}),
    ):
        layer, _ = last_of(graph, build, weights=weights)
        assert layer is None
