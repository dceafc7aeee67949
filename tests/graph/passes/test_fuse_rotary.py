"""Rotary positions as exporters write them are one operator on rows; what only looks so stays."""

from __future__ import annotations

from typing import TypeVar

import pytest
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from bertile.graph import ops
from bertile.graph.passes.fuse_attention import fuse_attention
from bertile.graph.passes.fuse_rotary import fuse_rotary
from bertile.schedules.attention_spec import AttentionSpec

batch, length = TypeVar("batch"), TypeVar("length")


@I.ir_module
class Before:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        cos: R.Tensor((1, length, 4), "float32"),
        sin: R.Tensor((1, length, 4), "float32"),
    ):
        q = R.permute_dims(R.reshape(x, (batch, length, 2, 4)), [0, 2, 1, 3])
        straight = R.multiply(q, R.expand_dims(cos, 1))
        second = R.strided_slice(q, [3], [2], [9223372036854775807], [1])  # to the end
        first = R.strided_slice(q, [3], [0], [2], [1])
        turned = R.concat([R.negative(second), first], axis=-1)
        return R.add(straight, R.multiply(turned, R.expand_dims(sin, 1)))


@I.ir_module
class After:
    @R.function
    def main(
        input_ids: R.Tensor((batch, length), "int64"),
        x: R.Tensor((batch, length, 8), "float32"),
        cos: R.Tensor((1, length, 4), "float32"),
        sin: R.Tensor((1, length, 4), "float32"),
    ):
        turned = ops.rotary(x, cos, sin, heads=2)
        return R.permute_dims(R.reshape(turned, (batch, length, 2, 4)), [0, 2, 1, 3])


def test_heads_are_turned_before_they_are_split(becomes):
    becomes(fuse_rotary, Before, After)


HEADS, SIZE, WIDTH = 2, 4, 8
ROWS = {"x": ("batch", "length", WIDTH)}
ANGLES = {name: (1, "length", SIZE) for name in ("cos", "sin")}


# The same with its parts changed one by one.


def split(emit, x):
    batch, length, _ = x.ty.shape
    return emit(op.reshape(x, relax.ShapeExpr([batch, length, HEADS, SIZE])))


def after(emit, ids, x, cos, sin):
    rows = emit(ops.rotary(x, cos, sin, HEADS))
    return op.permute_dims(split(emit, rows), [0, 2, 1, 3])


def halves_of(x, begins=(2, 0), ends=(4, 2), axis=3, negative=op.negative, swapped=False):
    parts = [op.strided_slice(x, [axis], [b], [e]) for b, e in zip(begins, ends)]
    parts = [negative(parts[0]), parts[1]]
    return op.concat(parts[::-1] if swapped else parts, axis=axis)


def turned(
    halves=halves_of,
    total=op.add,
    axes=(0, 2, 1, 3),
    of_heads=1,
    straight=lambda q, cos: op.multiply(q, cos),
    crossed=lambda halves, sin: op.multiply(halves, sin),
):
    def build(emit, ids, x, cos, sin):
        q = split(emit, x)
        q = emit(op.permute_dims(q, list(axes))) if axes else q
        cos, sin = (op.expand_dims(angles, of_heads) for angles in (cos, sin))
        return total(straight(q, cos), crossed(halves(q), sin))

    return build


SPELLINGS = {
    "the sum the other way round": turned(total=lambda a, b: op.add(b, a)),
    "products the other way round": turned(
        straight=lambda q, cos: op.multiply(cos, q), crossed=lambda h, sin: op.multiply(sin, h)
    ),
    "slices from the end": turned(lambda q: halves_of(q, begins=(-2, 0), axis=3)),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_rotary_is_found_in_other_spellings(becomes, spelling):
    becomes(fuse_rotary, spelling, after, activations={**ROWS, **ANGLES})


def test_halves_may_be_split_at_once(becomes):
    def split_in_two(emit, ids, x, cos, sin):
        q = emit(op.permute_dims(split(emit, x), [0, 2, 1, 3]))
        halves = emit(op.split(q, 2, axis=-1))
        crossed = op.concat([op.negative(emit(halves[1])), emit(halves[0])], axis=-1)
        cos, sin = (op.expand_dims(angles, 1) for angles in (cos, sin))
        return op.add(op.multiply(q, cos), op.multiply(crossed, sin))

    becomes(fuse_rotary, split_in_two, after, activations={**ROWS, **ANGLES})


def test_heads_that_are_not_permuted_yet_are_turned(becomes):
    def rows(emit, ids, x, cos, sin):
        return split(emit, emit(ops.rotary(x, cos, sin, HEADS)))

    unpermuted = turned(axes=None, of_heads=2)
    becomes(fuse_rotary, unpermuted, rows, activations={**ROWS, **ANGLES})


def test_angles_may_differ_by_row_and_come_with_their_axis(becomes):
    def with_axis(emit, ids, x, cos, sin):
        q = emit(op.permute_dims(split(emit, x), [0, 2, 1, 3]))
        return op.add(op.multiply(q, cos), op.multiply(halves_of(q), sin))

    def squeezed(emit, ids, x, cos, sin):
        return after(emit, ids, x, op.squeeze(cos, [1]), op.squeeze(sin, [1]))

    angles = {name: ("batch", 1, "length", SIZE) for name in ANGLES}
    becomes(fuse_rotary, with_axis, squeezed, activations={**ROWS, **angles})


def split_unevenly(q):
    parts = op.split(q, [1, 3], axis=3)
    return op.concat([op.negative(parts[2]), parts[1], parts[0]], axis=3)


def split_and_not_swapped(q):
    parts = op.split(q, 2, axis=3)
    return op.concat([op.negative(parts[0]), parts[1]], axis=3)


LOOK_ALIKES = {
    "three parts": turned(split_unevenly),
    "parts not swapped": turned(split_and_not_swapped),
    "the first half negative": turned(lambda q: halves_of(q, begins=(0, 2), ends=(2, 4))),
    "halves not swapped": turned(lambda q: halves_of(q, swapped=True)),
    "no half negative": turned(lambda q: halves_of(q, negative=lambda x: x)),
    "a half made positive": turned(lambda q: halves_of(q, negative=op.abs)),
    "parts that are no halves": turned(lambda q: halves_of(q, begins=(3, 0), ends=(4, 3))),
    "a difference": turned(total=op.subtract),
    "halves of tokens": turned(
        lambda q: op.concat([op.negative(q), q], axis=2), total=lambda a, b: b
    ),
    "channels by axes that are permuted otherwise": turned(axes=(2, 0, 1, 3), of_heads=0),
    "cos added": turned(straight=op.add),
    "pairs side by side": turned(
        lambda q: op.concat(
            [
                op.negative(op.strided_slice(q, [3], [1], [4], [2])),
                op.strided_slice(q, [3], [0], [4], [2]),
            ],
            axis=3,
        )
    ),
}


@pytest.mark.parametrize("build", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alike_is_left_alone(leaves_alone, build):
    leaves_alone(fuse_rotary, build, activations={**ROWS, **ANGLES})


def test_halves_of_another_tensor_are_left_alone(leaves_alone):
    def build(emit, ids, x, y, cos, sin):
        q, other = (emit(op.permute_dims(split(emit, rows), [0, 2, 1, 3])) for rows in (x, y))
        cos, sin = (op.expand_dims(angles, 1) for angles in (cos, sin))
        return op.add(op.multiply(q, cos), op.multiply(halves_of(other), sin))

    leaves_alone(fuse_rotary, build, activations={**ROWS, "y": ROWS["x"], **ANGLES})


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, SIZE), (1, HEADS, "length", SIZE), (1, 1, "length", 1)], ids=str
)
def test_angles_that_are_not_one_of_each_place_and_channel_are_left_alone(leaves_alone, shape):
    def build(emit, ids, x, cos, sin):
        q = emit(op.permute_dims(split(emit, x), [0, 2, 1, 3]))
        return op.add(op.multiply(q, cos), op.multiply(halves_of(q), sin))

    leaves_alone(fuse_rotary, build, activations={**ROWS, **{name: shape for name in ANGLES}})


def test_a_scale_before_it_is_one_behind_it(becomes):
    scale = relax.const(0.25, "float32")

    def before(emit, ids, x, cos, sin):
        q = emit(op.multiply(op.permute_dims(split(emit, x), [0, 2, 1, 3]), scale))
        cos, sin = (op.expand_dims(angles, 1) for angles in (cos, sin))
        return op.add(op.multiply(q, cos), op.multiply(halves_of(q), sin))

    def behind(emit, ids, x, cos, sin):
        return op.multiply(after(emit, ids, x, cos, sin), scale)

    becomes(fuse_rotary, before, behind, activations={**ROWS, **ANGLES})


# Behind it, in attention.


def attention(of_q=lambda x, cos, sin: ops.rotary(x, cos, sin, HEADS), of_k=None):
    def build(emit, ids, q, k, v, mask, cos, sin, *others):
        rotations = of_q, of_k or of_q
        angles = (cos, sin), others or (cos, sin)
        q, k = (
            emit(rotate(rows, *angle)) for rotate, rows, angle in zip(rotations, (q, k), angles)
        )
        q = emit(op.permute_dims(split(emit, q), [0, 2, 1, 3]))
        k = emit(op.permute_dims(split(emit, k), [0, 2, 3, 1]))
        scores = op.add(op.multiply(emit(op.matmul(q, k)), relax.const(0.5, "float32")), mask)
        v = op.permute_dims(split(emit, v), [0, 2, 1, 3])
        context = emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), v))
        batch, length, *_ = mask.ty.shape[0], mask.ty.shape[3]
        back = op.permute_dims(context, [0, 2, 1, 3])
        return op.reshape(back, relax.ShapeExpr([batch, length, WIDTH]))

    return build


QKV = {name: ("batch", "length", WIDTH) for name in "qkv"} | {"mask": ("batch", 1, 1, "length")}
SPEC = AttentionSpec(HEADS, HEADS, SIZE, 0.5)


def test_attention_joins_q_k_and_v_before_their_places(becomes):
    def joined(emit, ids, q, k, v, mask, cos, sin):
        qkv = op.concat([q, k, v], axis=2)
        return ops.attention(SPEC, ops.rotary(qkv, cos, sin, 2 * HEADS), mask)

    becomes(fuse_attention, attention(), joined, activations={**QKV, **ANGLES})


def test_angles_that_differ_between_q_and_k_stay_with_them(becomes):
    def apart(emit, ids, q, k, v, mask, cos, sin, c, s):
        q, k = ops.rotary(q, cos, sin, HEADS), ops.rotary(k, c, s, HEADS)
        return ops.attention(SPEC, op.concat([q, k, v], axis=2), mask)

    more = {name: ANGLES["cos"] for name in "cs"}
    becomes(fuse_attention, attention(), apart, activations={**QKV, **ANGLES, **more})


def test_places_of_q_alone_stay_with_it(becomes):
    def alone(emit, ids, q, k, v, mask, cos, sin):
        qkv = op.concat([ops.rotary(q, cos, sin, HEADS), k, v], axis=2)
        return ops.attention(SPEC, qkv, mask)

    before = attention(of_k=lambda x, cos, sin: x)
    becomes(fuse_attention, before, alone, activations={**QKV, **ANGLES})


def normed(x, gamma, epsilon=0.25, root=op.rsqrt):
    """RMSNorm over the last axis, as decoders write it."""
    mean = op.mean(op.multiply(x, x), axis=[-1], keepdims=True)
    return op.multiply(gamma, op.multiply(x, root(op.add(mean, relax.const(epsilon, "float32")))))


GAMMA = {"gamma": (SIZE,)}


def turned_and_normed(before_heads, norm=normed):
    """The heads are normed before or behind the permutation that brings them first."""

    def build(emit, ids, x, cos, sin, gamma):
        q = split(emit, x)
        q = emit(norm(q, gamma)) if before_heads else q
        q = emit(op.permute_dims(q, [0, 2, 1, 3]))
        q = q if before_heads else emit(norm(q, gamma))
        cos, sin = (op.expand_dims(angles, 1) for angles in (cos, sin))
        return op.add(op.multiply(q, cos), op.multiply(halves_of(q), sin))

    return build


@pytest.mark.parametrize("before_heads", [True, False])
def test_a_norm_of_each_head_is_part_of_it(becomes, before_heads):
    def expected(emit, ids, x, cos, sin, gamma):
        of_heads = emit(op.concat([gamma, gamma], axis=0))
        rows = emit(ops.rotary(x, cos, sin, HEADS, of_heads, 0.25))
        return op.permute_dims(split(emit, rows), [0, 2, 1, 3])

    before = turned_and_normed(before_heads)
    becomes(fuse_rotary, before, expected, activations={**ROWS, **ANGLES}, weights=GAMMA)


def test_what_is_no_norm_is_left_alone(leaves_alone):
    before = turned_and_normed(True, lambda x, gamma: normed(x, gamma, root=op.sqrt))
    leaves_alone(fuse_rotary, before, activations={**ROWS, **ANGLES}, weights=GAMMA)
