"""Finds rotary positions of Q and K and brings them before the heads are split, as one operator.

    permute(reshape(x)) · cos + concat(-second half, first half) · sin
        →  permute(reshape(bertile.rotary(x, cos, sin)))

A number that x is multiplied by before (ESM scales Q so) is multiplied by behind it instead.
RMSNorm of each head before that (Qwen3, Gemma 3) becomes part of the operator.

x is (B, S, H D); cos and sin are (B|1, 1, S, D), or (B|1, S, 1, D) where the heads are not permuted
yet. ``fuse_attention`` then sees Q and K as without positions, and joins both with V again.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape, static
from bertile.graph.rewriting.rms import RmsNorm, rms_norm

HEADS_FIRST = [0, 2, 1, 3]  # (B, S, H, D) → (B, H, S, D)


def fuse_rotary(graph: Graph) -> Graph:
    """Recognise heads of tokens whose halves are turned by the angles of their places."""
    return rewrite(graph, _rotary)


def _rotary(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "add"):
        return None
    terms = [flow.call(term, "multiply") for term in call.args]
    if any(term is None for term in terms):
        return None
    for straight, turned in (terms, terms[::-1]):
        for halves, sin in (turned.args, list(turned.args)[::-1]):
            x = _turned(flow, halves)
            cos = None if x is None else _other(straight, x)
            if cos is not None:
                return _of_rows(flow, x, cos, sin)
    return None


def _turned(flow: Dataflow, expr: Any) -> Any:
    """x of concat(-second half of x, first half of x) along its last axis."""
    whole = flow.call(expr, "concat")
    extents = shape(whole) if whole is not None else None
    if extents is None or int(whole.attrs["axis"]) not in (-1, len(extents) - 1):
        return None
    parts = flow.definition(whole.args[0]).fields
    negative = flow.call(parts[0], "negative") if len(parts) == 2 else None
    if negative is None or not static(extents[-1]) or extents[-1] % 2:
        return None
    half = extents[-1] // 2
    second = _slice(flow, negative.args[0], half, 2 * half)
    first = _slice(flow, parts[1], 0, half)
    return first if first is not None and second is not None and first.same_as(second) else None


def _slice(flow: Dataflow, expr: Any, begin: int, end: int) -> Any:
    """x of x[…, begin:end], of which ``end`` may also lie behind the last channel; or of a part of
    x that was split in two.
    """
    field = flow.definition(expr)
    if isinstance(field, relax.TupleGetItem):
        parts = flow.call(field.tuple_value, "split")
        extents = shape(parts.args[0]) if parts is not None else None
        last = extents is not None and int(parts.attrs.axis) in (-1, len(extents) - 1)
        even = last and shape(expr)[-1] * 2 == extents[-1] and field.index * (end - begin) == begin
        return parts.args[0] if even else None
    part = flow.call(expr, "strided_slice")
    if part is None or (shape(part) or [None])[-1] != end - begin:
        return None
    x, *numbers = part.args
    axes, begins, _, *steps = ([int(n) for n in field.fields] for field in numbers)
    extents = shape(x) or []
    right = axes in ([-1], [len(extents) - 1]) and steps in ([], [[1]])
    return x if right and [b % extents[-1] for b in begins] == [begin] else None


def _other(product: relax.Call, x: Any) -> Any:
    """What a product multiplies x by."""
    a, b = product.args
    return b if a.same_as(x) else a if b.same_as(x) else None


def _of_rows(flow: Dataflow, x: Any, cos: Any, sin: Any) -> Any:
    """The same on rows, with the heads split and permuted behind it."""
    scaled = flow.call(x, "multiply")
    split = flow.split_scalar(scaled) if scaled is not None else None
    if split is not None:
        turned = _of_rows(flow, split[0], cos, sin)
        factor = relax.const(split[1], "float32")
        return None if turned is None else relax.op.multiply(turned, factor)
    x, norm, permuted = _peeled(flow, x)
    split = flow.call(x, "reshape")
    extents = shape(split) if split is not None else None
    if extents is None or len(extents) != 4 or not all(map(static, extents[2:])):
        return None
    rows, (heads, size) = split.args[0], extents[2:]
    if not flow.is_tokens(rows) or shape(rows)[2] != heads * size:
        return None
    of_heads = 1 if permuted else 2
    angles = [_angles(flow, table, of_heads, size, rows) for table in (cos, sin)]
    if any(angle is None for angle in angles):
        return None
    normed = ()
    if norm is not None:
        normed = (relax.op.concat([norm.gamma] * heads, axis=0), norm.epsilon)
    turned = relax.op.reshape(ops.rotary(rows, *angles, heads, *normed), split.ty.shape)
    return relax.op.permute_dims(turned, HEADS_FIRST) if permuted else turned


def _peeled(flow: Dataflow, x: Any) -> tuple[Any, RmsNorm | None, bool]:
    """What lies behind a norm of each head and a permutation that brings the heads first, in
    whatever order they are; the norm, and whether there is the permutation.
    """
    norm, permuted = None, False
    while True:
        step = flow.call(x, "permute_dims")
        axes = step.attrs["axes"] if step is not None else None
        if not permuted and axes is not None and [int(a) for a in axes] == HEADS_FIRST:
            x, permuted = step.args[0], True
        elif norm is None and (norm := rms_norm(flow, x)) is not None:
            x = norm.x
        else:
            return x, norm, permuted


def _angles(flow: Dataflow, expr: Any, of_heads: int, size: int, rows: Any) -> Any:
    """(B|1, S, D) of angles with an axis of one for the heads."""
    extents = shape(expr)
    if extents is None or len(extents) != 4 or extents[of_heads] != 1 or extents[3] != size:
        return None
    of_places = expr.ty.shape[3 - of_heads]
    whole = tvm_ffi.structural_equal(of_places, rows.ty.shape[1])
    batch = extents[0] == 1 or tvm_ffi.structural_equal(expr.ty.shape[0], rows.ty.shape[0])
    if not whole or not batch:
        return None
    wider = flow.call(expr, "expand_dims")
    if wider is not None and [int(axis) for axis in wider.attrs["axis"]] == [of_heads]:
        return wider.args[0]
    return relax.op.squeeze(expr, [of_heads])
