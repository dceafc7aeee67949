"""Attention with its scale, mask and biases in the places where exporters put them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
from helpers.attention_variants import CLOSING, VARIANTS
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_attention import fuse_attention
from bertile.schedules.attention_spec import AttentionSpec

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        q: R.Tensor((batch, length, 8), "float32"),
        k: R.Tensor((batch, length, 8), "float32"),
        v: R.Tensor((batch, length, 8), "float32"),
        mask: R.Tensor((batch, 1, 1, length), "float32"),
    ):
        queries = R.permute_dims(R.reshape(q, (batch, length, 2, 4)), [0, 2, 1, 3])
        keys = R.permute_dims(R.reshape(k, (batch, length, 2, 4)), [0, 2, 3, 1])
        values = R.permute_dims(R.reshape(v, (batch, length, 2, 4)), [0, 2, 1, 3])
        scores = R.multiply(R.matmul(queries, keys), R.const(0.5, "float32"))
        weights = R.nn.softmax(R.add(scores, mask), axis=-1)
        context = R.permute_dims(R.matmul(weights, values), [0, 2, 1, 3])
        return R.reshape(context, (batch, length, 8))


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        q: R.Tensor((batch, length, 8), "float32"),
        k: R.Tensor((batch, length, 8), "float32"),
        v: R.Tensor((batch, length, 8), "float32"),
        mask: R.Tensor((batch, 1, 1, length), "float32"),
    ):
        qkv = R.concat([q, k, v], axis=2)
        return ops.attention(
            AttentionSpec(heads=2, kv_heads=2, head_size=4, scale=0.5, bias="none"), qkv, mask
        )


def test_attention_of_heads_becomes_one_operator(becomes):
    becomes(fuse_attention, Before, After)


HEADS, SIZE, WIDTH = 2, 4, 8
MASK = ("batch", 1, 1, "length")
BIAS = (1, HEADS, "length", "length")


def c(value):
    return relax.const(value, "float32")


def inputs(**more):
    """Q, K, V (batch, length, 8) and what is added to the scores."""
    return {**{name: ("batch", "length", WIDTH) for name in "qkv"}, **more}


def heads_of(x, axes=(0, 2, 1, 3), heads=HEADS):
    """(B, S, H D) → (B, H, S, D), or another permutation of (B, S, H, D)."""
    batch, length, width = x.ty.shape
    split = op.reshape(x, relax.ShapeExpr([batch, length, heads, width // heads]))
    return op.permute_dims(split, list(axes))


def merged(emit, context):
    """(B, H, S, D) → (B, S, H D)."""
    back = emit(op.permute_dims(context, [0, 2, 1, 3]))
    batch, length, heads, size = back.ty.shape
    return op.reshape(back, relax.ShapeExpr([batch, length, heads * size]))


def spelled_out(
    scores=lambda s, *added: op.add(op.multiply(s, c(0.5)), added[0]),
    q=lambda x: x,
    k=lambda x: x,
    k_axes=(0, 2, 3, 1),
    v_axes=(0, 2, 1, 3),
    axis=-1,
    heads=HEADS,
    twisted=lambda context: context,
):
    """Attention whose parts may be changed one by one."""

    def build(emit, ids, qs, ks, vs, *added):
        left = emit(q(emit(heads_of(emit(qs), heads=heads))))
        right = emit(k(emit(heads_of(emit(ks), k_axes, heads))))
        product = emit(op.matmul(left, right))
        weights = emit(op.nn.softmax(scores(product, *added), axis=axis))
        context = emit(op.matmul(weights, heads_of(emit(vs), v_axes, heads)))
        return merged(emit, emit(twisted(context)))

    return build


def fused(scale=0.5, mask=lambda *added: added[0], bias=lambda *added: None, heads=HEADS):
    def build(emit, ids, q, k, v, *added):
        qkv, biases = (
            op.concat([q, k, v], axis=2),
            [tensor for tensor in [bias(*added)] if tensor is not None],
        )
        kind = "tensor" if biases else "none"
        spec = AttentionSpec(heads, heads, WIDTH // heads, scale, bias=kind)
        return ops.attention(spec, qkv, mask(*added), *biases)

    return build


SCALES = {
    "divisor of the scores": spelled_out(lambda s, m: op.add(op.divide(s, c(2.0)), m)),
    "factor of q": spelled_out(op.add, q=lambda x: op.multiply(x, c(0.5))),
    "divisor of k": spelled_out(op.add, k=lambda x: op.divide(x, c(2.0))),
    "a part on each": spelled_out(
        op.add, q=lambda x: op.multiply(c(0.25), x), k=lambda x: op.multiply(x, c(2.0))
    ),
    "q, k and scores": spelled_out(
        q=lambda x: op.multiply(x, c(2.0)), k=lambda x: op.divide(x, c(2.0))
    ),
    "mask first": spelled_out(lambda s, m: op.add(m, op.multiply(c(0.5), s))),
    "last axis by its number": spelled_out(axis=3),
}


@pytest.mark.parametrize("before", SCALES.values(), ids=SCALES)
def test_scale_is_found_wherever_it_stands(becomes, before):
    becomes(fuse_attention, before, fused(), activations=inputs(mask=MASK))


def test_scale_on_the_unsplit_query_is_found(becomes):
    def before(emit, ids, q, k, v, mask):
        scaled = emit(op.multiply(q, c(0.5)))
        return spelled_out(op.add)(emit, ids, scaled, k, v, mask)

    becomes(fuse_attention, before, fused(), activations=inputs(mask=MASK))


def test_keys_permuted_twice_are_followed(becomes):
    before = spelled_out(k_axes=(0, 2, 1, 3), k=lambda x: op.permute_dims(x, [0, 1, 3, 2]))
    becomes(fuse_attention, before, fused(), activations=inputs(mask=MASK))


def test_scores_without_a_mask_get_one_of_zeros(becomes):
    def zeros(emit, ids, q, k, v):
        mask = op.zeros(relax.ShapeExpr([1, 1, 1, q.ty.shape[1]]), "float32")
        return fused(mask=lambda *_: mask)(emit, ids, q, k, v)

    before = spelled_out(lambda s: op.multiply(s, c(0.5)))
    becomes(fuse_attention, before, zeros, activations=inputs())


@pytest.mark.parametrize("mask", [MASK, (1, 1, 1, "length")], ids=str)
@pytest.mark.parametrize(
    "bias",
    [BIAS, (1, 1, "length", "length"), ("batch", HEADS, "length", "length")],
    ids=str,
)
def test_what_differs_between_queries_is_a_bias(becomes, mask, bias):
    becomes(
        fuse_attention,
        spelled_out(lambda s, m, b: op.add(op.add(op.multiply(s, c(0.5)), b), m)),
        fused(bias=lambda m, b: b),
        activations=inputs(mask=mask, bias=bias),
    )


def test_two_masks_are_added_once(becomes):
    becomes(
        fuse_attention,
        spelled_out(lambda s, a, b: op.add(op.add(op.multiply(s, c(0.5)), a), b)),
        fused(mask=lambda a, b: op.add(a, b)),
        activations=inputs(a=MASK, b=MASK),
    )


def test_one_head_is_attention_too(becomes):
    becomes(fuse_attention, spelled_out(heads=1), fused(heads=1), activations=inputs(mask=MASK))


def alone(before, **more):
    return before, inputs(**(more or {"mask": MASK}))


def places_of(ids, **options):
    """1, 2, 3, … along each row of ids."""
    return op.cumsum(op.astype(op.equal(ids, ids), "int64"), **{"axis": 1, **options})


def distances(emit, keys, queries=None):
    """key - query (batch, 1, length, length) of their places."""
    across = op.expand_dims(op.expand_dims(keys, 1), 2)
    down = op.expand_dims(keys if queries is None else queries, [1, 3])
    return op.subtract(across, down)


def hidden(closed, number=-10000.0):
    """What is added to the scores of keys that are closed."""
    return op.multiply(op.astype(closed, "float32"), c(number))


def with_places(closed, number=-10000.0, places=places_of, over=distances):
    """Attention with a mask of keys, and one of places: of key - query, by ``closed``."""

    def build(emit, ids, q, k, v, mask):
        distance = emit(over(emit, emit(places(ids))))
        added = emit(hidden(closed(distance), number))
        whole = spelled_out(lambda s, m, p: op.add(op.add(op.multiply(s, c(0.5)), m), p))
        return whole(emit, ids, q, k, v, mask, added)

    return build


def fused_with_places(bias, **fields):
    """The same fused: with these fields of a spec, and a bias of places that do not say as much."""

    def build(emit, ids, q, k, v, mask):
        qkv = op.concat([q, k, v], axis=2)
        spec = AttentionSpec(HEADS, HEADS, SIZE, 0.5, bias="tensor" if bias else "none", **fields)
        return ops.attention(spec, qkv, mask, *([bias(emit, ids)] if bias else []))

    return build


@pytest.mark.parametrize("variant", CLOSING)
def test_keys_that_are_seen_by_their_places_are_a_field(becomes, variant):
    before = with_places(VARIANTS[variant].closed)
    after = fused_with_places(None, **VARIANTS[variant].fields)
    becomes(fuse_attention, before, after, activations=inputs(mask=MASK))


def after_all(distance):
    return op.greater(distance, relax.const(0, "int64"))


BIASES_OF_PLACES = {
    "another reach": dict(
        closed=lambda d: op.logical_or(
            op.less(d, relax.const(-4, "int64")), op.greater(d, relax.const(2, "int64"))
        )
    ),
    "the past closed": dict(closed=lambda d: op.less(d, relax.const(0, "int64"))),
    "not the own key": dict(closed=lambda d: op.greater(d, relax.const(-1, "int64"))),
    "twice the same side": dict(closed=lambda d: op.logical_or(after_all(d), after_all(d))),
    "a low number": dict(closed=after_all, number=-1.0),
    "a high number": dict(closed=after_all, number=10000.0),
    "query - key": dict(
        closed=after_all,
        over=lambda emit, p: op.multiply(distances(emit, p), relax.const(-1, "int64")),
    ),
    "two counts": dict(
        closed=after_all,
        over=lambda emit, p: distances(emit, p, op.add(p, relax.const(1, "int64"))),
    ),
    "places before": dict(closed=after_all, places=lambda ids: places_of(ids, exclusive=True)),
    "along the batch": dict(closed=after_all, places=lambda ids: places_of(ids, axis=0)),
    "a count of some": dict(
        closed=after_all,
        places=lambda ids: op.cumsum(
            op.astype(op.equal(ids, relax.const(1, "int64")), "int64"), axis=1
        ),
    ),
}


@pytest.mark.parametrize("options", BIASES_OF_PLACES.values(), ids=BIASES_OF_PLACES)
def test_other_comparisons_of_places_are_a_bias(becomes, options):
    def bias(emit, ids, places=places_of, over=distances, closed=None, number=-10000.0):
        return emit(hidden(closed(emit(over(emit, emit(places(ids))))), number))

    after = fused_with_places(lambda emit, ids: bias(emit, ids, **options))
    becomes(fuse_attention, with_places(**options), after, activations=inputs(mask=MASK))


LOOK_ALIKES = {
    "softmax over queries": alone(spelled_out(axis=2)),
    "mask inside of the scale": alone(spelled_out(lambda s, m: op.multiply(op.add(s, m), c(0.5)))),
    "scale by a tensor": alone(
        spelled_out(lambda s, m, t: op.add(op.multiply(s, t), m)), mask=MASK, t=MASK
    ),
    "mask multiplied": alone(spelled_out(lambda s, m: op.multiply(s, m))),
    "scale inverted": alone(spelled_out(lambda s, m: op.add(op.divide(c(2.0), s), m))),
    "activation of the context": alone(spelled_out(twisted=op.nn.relu)),
    "mask of one axis": alone(spelled_out(), mask=("length",)),
    "bias per key and head": alone(spelled_out(), mask=(1, HEADS, 1, "length")),
    "bias per query alone": alone(spelled_out(), mask=("batch", 1, "length", 1)),
    "one number for all keys": alone(spelled_out(), mask=("batch", 1, 1, 1)),
}


@pytest.mark.parametrize("before,activations", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alike_is_left_alone(leaves_alone, before, activations):
    leaves_alone(fuse_attention, before, activations=activations)


def test_keys_of_another_sequence_are_left_alone(leaves_alone):
    memory = ("batch", 5, WIDTH)  # cross-attention
    leaves_alone(
        fuse_attention,
        spelled_out(),
        activations={
            "q": ("batch", "length", WIDTH),
            "k": memory,
            "v": memory,
            "mask": (1, 1, 1, 5),
        },
    )


def test_permutation_without_axes_is_left_alone(leaves_alone):
    """ONNX's Transpose without ``perm`` reverses all axes."""

    def before(emit, ids, x):
        batch, length, width = x.ty.shape
        split = emit(op.reshape(x, relax.ShapeExpr([batch, length, HEADS, SIZE])))
        return op.reshape(op.permute_dims(split), relax.ShapeExpr([batch, length, width]))

    leaves_alone(fuse_attention, before)


def test_keys_permuted_without_axes_are_left_alone(leaves_alone):
    before = spelled_out(k_axes=(0, 2, 1, 3), k=lambda x: op.permute_dims(x), heads=4)
    square = {name: (4, 4, 16) for name in "qkv"} | {"mask": (4, 1, 1, 4)}
    leaves_alone(fuse_attention, before, activations=square)


ROWS, LONGEST = 6, 20
TABLES = {"near_keys": (1, HEADS, SIZE, ROWS), "near_queries": (1, HEADS, SIZE, ROWS)}
# The row of each distance query - key: 4 on the side of keys before, from which on one is for all.
ROW = np.clip(np.arange(1 - LONGEST, LONGEST) + 3, 0, ROWS - 1)


def places(length, axis):
    """0, 1, 2, … across (1, S), or down (S, 1)."""
    numbers = relax.const(np.arange(LONGEST)[None], "int64")
    cut = op.strided_slice(numbers, [1], [0], [length], [1], assume_inbound=True)
    return op.permute_dims(cut, [1, 0]) if axis == 0 else cut


def looked_up(emit, x, table, start, row=ROW, across=1, count=ROWS, middle=LONGEST - 1):
    """x (B, H, S, D) by a table, of which each pair of tokens takes the product of its distance."""
    batch, heads, length, _ = x.ty.shape
    products = emit(op.matmul(x, table))
    flat = emit(op.reshape(products, relax.ShapeExpr([batch, heads, length * ROWS])))
    distance = emit(op.subtract(places(length, 0), places(length, across)))
    moved = emit(op.add(distance, relax.const(middle, "int64")))
    rows = emit(op.take(relax.const(row, "int64"), moved, axis=0, mode="clip"))
    begin = emit(op.multiply(places(length, start), relax.const(count, "int64")))
    return emit(op.take(flat, emit(op.add(rows, begin)), axis=2, mode="clip"))


def with_tables(scaled=lambda scores: op.multiply(scores, c(0.5)), starts=(0, 1), **options):
    """Attention with both kinds of products by distance."""

    def build(emit, ids, q, k, v, mask, near_keys, near_queries):
        queries, keys = emit(heads_of(q)), emit(heads_of(k))
        scores = emit(op.matmul(queries, emit(op.permute_dims(keys, [0, 1, 3, 2]))))
        first = looked_up(emit, queries, near_keys, starts[0], **options)
        scores = emit(op.add(scores, first))
        second = looked_up(emit, keys, near_queries, starts[1], **options)
        scores = emit(scaled(emit(op.add(scores, second))))
        weights = emit(op.nn.softmax(emit(op.add(scores, mask)), axis=-1))
        return merged(emit, emit(op.matmul(weights, heads_of(v))))

    return build


GROUP = 2
SHARED = {
    **{name: ("batch", "length", width) for name, width in (("q", 8), ("k", 4), ("v", 4))},
    "mask": MASK,
}


def repeated(emit, x, times=GROUP, axis=2):
    """(B, KV, S, D) → (B, n KV, S, D), each head n times, as transformers' repeat_kv."""
    batch, heads, length, size = x.ty.shape
    extents = [batch, heads, length, size]
    wide = emit(op.expand_dims(x, axis))
    wide = emit(op.broadcast_to(wide, relax.ShapeExpr([*extents[:axis], times, *extents[axis:]])))
    return emit(op.reshape(wide, relax.ShapeExpr([batch, int(heads) * times, length, size])))


def grouped(scores=lambda s, m: op.add(op.multiply(s, c(0.5)), m), repeat=repeated):
    """Attention of two heads of queries with one of keys and values."""

    def build(emit, ids, q, k, v, mask):
        q = emit(heads_of(emit(q)))
        k, v = (repeat(emit, emit(heads_of(emit(x), heads=1))) for x in (k, v))
        product = emit(op.matmul(q, op.permute_dims(k, [0, 1, 3, 2])))
        weights = emit(op.nn.softmax(scores(product, mask), axis=-1))
        return merged(emit, emit(op.matmul(weights, v)))

    return build


def test_products_by_distance_are_operands(becomes):
    def after(emit, ids, q, k, v, mask, near_keys, near_queries):
        qkv = op.concat([q, k, v], axis=2)
        spec = AttentionSpec(HEADS, HEADS, SIZE, 0.5, relative="both", last=3)
        rows = relax.const(ROW[LONGEST - 4 : LONGEST + 3], "int64")
        return ops.attention(spec, qkv, mask, near_keys, near_queries, rows)

    shapes = {"activations": inputs(mask=MASK), "weights": TABLES}
    becomes(fuse_attention, with_tables(), after, **shapes)


NEITHER = {
    "both by the place of queries": with_tables(starts=(0, 0)),
    "queries by the place of keys": with_tables(starts=(1, 0)),
    "key - query, and both down": with_tables(across=0),
    "another count of rows": with_tables(count=ROWS + 1),
    "another middle": with_tables(middle=LONGEST),
    "a row that is not there": with_tables(row=ROW + 1),
    "products that are not scaled": with_tables(scaled=lambda scores: op.nn.relu(scores)),
}


@pytest.mark.parametrize("before", NEITHER.values(), ids=NEITHER)
def test_other_lookups_of_products_are_left_alone(leaves_alone, before):
    leaves_alone(fuse_attention, before, activations=inputs(mask=MASK), weights=TABLES)


def shared(softcap=0.0):
    def build(emit, ids, q, k, v, mask):
        spec = AttentionSpec(HEADS, 1, SIZE, 0.5, softcap=softcap)
        return ops.attention(spec, op.concat([q, k, v], axis=2), mask)

    return build


def test_heads_that_are_repeated_for_a_group_are_shared(becomes):
    becomes(fuse_attention, grouped(), shared(), activations=SHARED)


CAPS = {
    "divided": lambda s, m: op.add(
        op.multiply(op.tanh(op.divide(op.multiply(s, c(0.5)), c(4.0))), c(4.0)), m
    ),
    "multiplied": lambda s, m: op.add(op.multiply(c(4.0), op.tanh(op.multiply(s, c(0.125)))), m),
}


@pytest.mark.parametrize("scores", CAPS.values(), ids=CAPS)
def test_a_bound_on_scores_is_a_field(becomes, scores):
    becomes(fuse_attention, grouped(scores), shared(4.0), activations=SHARED)


UNLIKE = {
    "each token repeated": grouped(repeat=lambda emit, x: repeated(emit, x, axis=3)),
    "a negative bound": grouped(lambda s, m: op.add(op.multiply(op.tanh(s), c(-4.0)), m)),
    "a scale behind a bound": grouped(
        lambda s, m: op.add(op.multiply(op.multiply(op.tanh(s), c(4.0)), c(2.0)), m)
    ),
}


@pytest.mark.parametrize("before", UNLIKE.values(), ids=UNLIKE)
def test_what_only_looks_like_a_group_or_a_bound_is_left_alone(leaves_alone, before):
    leaves_alone(fuse_attention, before, activations=SHARED)
