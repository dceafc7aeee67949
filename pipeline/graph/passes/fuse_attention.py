"""Makes one operator on Q, K and V side by side of attention as exporters write it.

    q, k, v (B, S, H D) → reshape, permute → matmul · scale + masks → softmax → matmul → permute,
    reshape
        →  bertile.attention(concat(q, k, v), mask, [bias], [tables by distance])

k and v may be fewer heads, each repeated for a group of q's; what repeats them is dropped. Rotary
positions of q and of k by the same angles become those of the first heads of all three.

The scale may stand on q, on k, on both or on the scores, as a factor or a divisor. A bound on
scores, c · tanh(scores / c), is a field. What is added to the scores is the mask where it is the
same for all heads and queries, which keys a query sees where it is the canonical comparison of
places (``onnx_masks.places_mask``), and a bias otherwise:

    (key - query < -before or key - query > behind) * -1e29  →  {keys, window} of that reach

What is added to the product of q and k before its scale are products by distance (``rewriting.
by_distance``), whose tables and rows become operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tvm_ffi
from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.by_distance import ByDistance, by_distance
from bertile.graph.rewriting.dataflow import Dataflow, rewrite, shape, static
from bertile.onnx.masks import CLOSED
from bertile.schedules.attention_spec import RELATIVE, AttentionSpec, Reach, keys_of_reach


def fuse_attention(graph: Graph) -> Graph:
    """Recognise attention of tokens to the tokens of their own sequence."""
    return rewrite(graph, _attention)


class _Heads(NamedTuple):
    x: Any  # (B, S, H D)
    axes: tuple[int, ...]  # how (B, S, H, D) is permuted
    heads: int
    size: int
    scale: float
    repeats: int = 1  # how often each head is there, one behind the other


class _Scores(NamedTuple):
    q: _Heads
    k: _Heads
    scale: float
    added: list[Any]
    tables: tuple[ByDistance, ...] = ()
    softcap: float = 0.0


def _attention(flow: Dataflow, call: relax.Call) -> Any:
    if not flow.is_op(call, "reshape") or len(shape(call) or []) != 3:
        return None
    back = flow.call(call.args[0], "permute_dims")
    if back is None or _axes(back) != (0, 2, 1, 3):
        return None
    context = flow.call(back.args[0], "matmul")
    softmax = flow.call(context.args[0], "nn.softmax") if context is not None else None
    if softmax is None or int(softmax.attrs["axis"]) not in (-1, 3):
        return None
    scores, v = _scores(flow, softmax.args[0]), _heads(flow, context.args[1])
    if scores is None or v is None or not _consistent(flow, scores, v):
        return None
    length = call.ty.shape[1]
    masks = [term for term in scores.added if _is_mask(term, length)]
    biases = [term for term in scores.added if _is_bias(term, length)]
    if len(masks) + len(biases) < len(scores.added):
        return None
    keys, biases = _keys(flow, biases)
    tables = sorted(scores.tables, key=lambda table: table.kind)  # keys before queries
    relative = {}
    if tables:
        kinds = tuple(table.kind for table in tables)
        name = next(name for name, known in RELATIVE.items() if known == kinds)
        relative = {"relative": name, "last": len(tables[0].rows) // 2}
    spec = AttentionSpec(
        heads=scores.q.heads,
        kv_heads=v.heads,
        head_size=v.size,
        scale=scores.scale * scores.q.scale * scores.k.scale,
        bias="tensor" if biases else "none",
        softcap=scores.softcap,
        **keys,
        **relative,
    )
    qkv = _joined(flow, scores.q, scores.k, v)
    mask = _sum(masks) if masks else _no_mask(call)
    rows = [relax.const(tables[0].rows, "int64")] if tables else []
    bias = [_sum(biases)] if biases else []
    return ops.attention(spec, qkv, mask, *bias, *(table.table for table in tables), *rows)


def _consistent(flow: Dataflow, scores: _Scores, v: _Heads) -> bool:
    q, k = scores.q, scores.k
    same_heads = {(h.heads * h.repeats, h.size) for h in (q, k, v)} == {(q.heads, v.size)}
    same_heads = same_heads and k.repeats == v.repeats
    axes = (q.axes, k.axes, v.axes) == ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
    tokens = all(flow.is_tokens(h.x) for h in (q, k, v))
    tables = all(_meets(flow, table, scores) for table in scores.tables)
    kinds = {table.kind for table in scores.tables}
    rows = {table.rows.tobytes() for table in scores.tables}
    once = len(scores.tables) == len(kinds) and len(rows) <= 1
    return same_heads and axes and tokens and tables and once and v.scale == 1.0


def _meets(flow: Dataflow, table: ByDistance, scores: _Scores) -> bool:
    """Whether a table is multiplied with the same q or k as both are with each other."""
    mine = _heads(flow, table.x)
    theirs = scores.q if table.kind == "keys" else scores.k
    same = mine is not None and (mine.heads, mine.size) == (theirs.heads, theirs.size)
    plain = (
        same and mine.axes == (0, 2, 1, 3) and mine.scale == scores.q.scale == scores.k.scale == 1
    )
    if not plain or shape(table.table)[1:3] != [mine.heads, mine.size]:
        return False
    return flow.definition(mine.x).same_as(flow.definition(theirs.x))


def _joined(flow: Dataflow, q: _Heads, k: _Heads, v: _Heads) -> Any:
    """Q, K and V side by side, and behind that the rotary positions that Q and K have in common."""
    turned = [flow.call(rotary.x, "bertile.rotary") for rotary in (q, k)]
    if any(rotary is None for rotary in turned) or not _turned_alike(flow, *turned):
        return relax.op.concat([q.x, k.x, v.x], axis=2)
    (of_q, cos, sin, *gammas), (of_k, _, _, *more) = (rotary.args for rotary in turned)
    normed = ()
    if gammas:
        normed = (relax.op.concat([*gammas, *more], axis=0), float(turned[0].attrs["epsilon"]))
    qkv = relax.op.concat([of_q, of_k, v.x], axis=2)
    return ops.rotary(qkv, cos, sin, q.heads + k.heads, *normed)


def _turned_alike(flow: Dataflow, q: relax.Call, k: relax.Call) -> bool:
    """Whether both are turned by the same variables, or by the same part of them, and are normed
    with the same epsilon, if at all.
    """
    epsilons = [float(r.attrs["epsilon"]) if "epsilon" in r.attrs else None for r in (q, k)]
    pairs = zip(q.args[1:3], k.args[1:3])
    same = all(tvm_ffi.structural_equal(*map(flow.definition, pair)) for pair in pairs)
    return same and epsilons[0] == epsilons[1]


def _keys(flow: Dataflow, biases: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The fields of a spec that say which keys are seen, and the biases that say more than that."""
    for place, term in enumerate(biases):
        reach = _reach(flow, term)
        fields = None if reach is None else keys_of_reach(reach)
        if fields is not None:
            return fields, biases[:place] + biases[place + 1 :]
    return {}, biases


def _reach(flow: Dataflow, term: Any) -> Reach | None:
    """How far queries see by the canonical comparison of places; None for anything else."""
    closed = flow.call(term, "multiply")
    split = flow.split_scalar(closed) if closed is not None else None
    number = flow.call(split[0], "astype") if split and split[1] <= CLOSED else None
    if number is None:
        return None
    outside = flow.definition(number.args[0])
    both = outside.args if flow.is_op(outside, "logical_or") else [outside]
    before = behind = None
    for side in both:
        compared = flow.call(side, "less", "greater")
        limit = flow.scalar(compared.args[1]) if compared is not None else None
        if limit is None or limit != int(limit) or not _is_distance(flow, compared.args[0]):
            return None
        if flow.is_op(compared, "less") and before is None:
            before = -int(limit)
        elif flow.is_op(compared, "greater") and behind is None:
            behind = int(limit)
        else:
            return None
    return before, behind


def _is_distance(flow: Dataflow, expr: Any) -> bool:
    """key - query, of places that are counted along the request's ids."""
    difference = flow.call(expr, "subtract")
    if difference is None:
        return False
    keys, queries = difference.args
    across = (shape(keys) or [])[1:3] == [1, 1]
    down = (shape(queries) or [])[1::2] == [1, 1]
    keys, queries = (_counted(flow, side) for side in (keys, queries))
    return across and down and keys is not None and keys.same_as(queries)


def _counted(flow: Dataflow, expr: Any) -> Any:
    """The input whose tokens ``expr`` counts along each row: 1, 2, 3, …; None of anything else."""
    while (wider := flow.call(expr, "expand_dims")) is not None:
        expr = wider.args[0]
    counted = flow.call(expr, "cumsum")
    along_rows = counted is not None and int(counted.attrs.axis) == 1
    ones = flow.call(counted.args[0], "astype") if along_rows else None
    same = flow.call(ones.args[0], "equal") if ones is not None else None
    if same is None or counted.attrs.exclusive:
        return None
    first, second = map(flow.definition, same.args)
    return first if isinstance(first, relax.Var) and first.same_as(second) else None


def _scores(flow: Dataflow, expr: Any) -> _Scores | None:
    """The product q kᵀ behind ``expr``, what it is multiplied by, and what is added to it."""
    if (product := flow.call(expr, "matmul")) is not None:
        q, k = (_heads(flow, side) for side in product.args)
        return _Scores(q, k, 1.0, []) if q and k else None
    if (scaled := flow.call(expr, "multiply", "divide")) is not None:
        split = _scalar_factor(flow, scaled)
        if split is None:
            return None
        bounded = flow.call(split[0], "tanh")
        inner = _scores(flow, split[0] if bounded is None else bounded.args[0])
        # a scale outside of a mask would scale the mask
        if inner is None or inner.added or inner.softcap:
            return None
        # c tanh(s · score) = c tanh((s c) score / c)
        cap = 0.0 if bounded is None else split[1]
        return inner._replace(scale=inner.scale * split[1], softcap=cap) if cap >= 0 else None
    if (total := flow.call(expr, "add")) is not None:
        for value, other in (total.args, list(total.args)[::-1]):
            inner = _scores(flow, value)
            if inner is not None and inner.scale == 1.0 and (near := by_distance(flow, other)):
                return inner._replace(tables=(*inner.tables, near))
            if inner is not None:
                return inner._replace(added=[*inner.added, other])
    return None


def _heads(flow: Dataflow, expr: Any) -> _Heads | None:
    """Follow permutations and scalings back to the reshape that made heads of (B, S, H D)."""
    axes, scale = (0, 1, 2, 3), 1.0
    while (step := flow.call(expr, "permute_dims", "multiply", "divide")) is not None:
        if flow.is_op(step, "permute_dims"):
            inner = _axes(step)
            if len(inner) != 4:
                return None
            axes, expr = tuple(inner[a] for a in axes), step.args[0]
        else:
            split = _scalar_factor(flow, step)
            if split is None:
                return None
            expr, scale = split[0], scale * split[1]
    if (repeated := _repeated(flow, expr)) is not None:
        of_groups, repeats = _heads(flow, repeated[0]), repeated[1]
        if of_groups is None or of_groups.axes != (0, 2, 1, 3) or of_groups.repeats != 1:
            return None
        axes, scale = tuple(of_groups.axes[a] for a in axes), scale * of_groups.scale
        return of_groups._replace(axes=axes, scale=scale, repeats=repeats)
    split_heads = flow.call(expr, "reshape")
    extents = shape(split_heads) if split_heads is not None else None
    if extents is None or len(extents) != 4 or not all(map(static, extents[2:])):
        return None
    x = split_heads.args[0]
    scaled = flow.call(x, "multiply", "divide")
    if scaled is not None and (split := _scalar_factor(flow, scaled)) is not None:
        x, scale = split[0], scale * split[1]
    return _Heads(x, axes, extents[2], extents[3], scale)


def _repeated(flow: Dataflow, expr: Any) -> tuple[Any, int] | None:
    """x (B, KV, S, D) and n of reshape(broadcast(x (B, KV, 1, S, D), (B, KV, n, S, D)))."""
    merged = flow.call(expr, "reshape")
    wide = flow.call(merged.args[0], "broadcast_to") if merged is not None else None
    thin = flow.call(wide.args[0], "expand_dims", "reshape") if wide is not None else None
    if thin is None or len(shape(thin.args[0]) or []) != 4 or len(shape(wide) or []) != 5:
        return None
    batch, heads, *rest = thin.args[0].ty.shape
    repeats, merged_heads = shape(wide)[2], shape(merged)[1]
    if shape(thin)[2] != 1 or not static(repeats) or merged_heads != int(heads) * repeats:
        return None
    thin_extents = zip(wide.ty.shape, (batch, heads, wide.ty.shape[2], *rest))
    right = all(tvm_ffi.structural_equal(*pair) for pair in thin_extents)
    return (thin.args[0], repeats) if right else None


def _scalar_factor(flow: Dataflow, call: relax.Call) -> tuple[Any, float] | None:
    """The other operand and the factor of a multiplication or division by a constant."""
    if flow.is_op(call, "divide"):
        divisor = flow.scalar(call.args[1])
        return (call.args[0], 1.0 / divisor) if divisor else None
    return flow.split_scalar(call)


def _axes(permutation: relax.Call) -> tuple[int, ...]:
    """The axes of a permutation; without any it reverses them."""
    axes = permutation.attrs["axes"]
    rank = len(permutation.ty.shape)
    return tuple(range(rank))[::-1] if axes is None else tuple(int(a) for a in axes)


def _is_mask(term: Any, length: Any) -> bool:
    """(B|1, 1, 1, S): the same for all heads and queries."""
    extents = shape(term) or []
    return extents[1:3] == [1, 1] and len(extents) == 4 and _same_extent(term, 3, length)


def _is_bias(term: Any, length: Any) -> bool:
    """(B|1, H|1, S, S), and no mask; a length of 1 makes it one."""
    four = len(shape(term) or []) == 4 and not _is_mask(term, length)
    return four and _same_extent(term, 2, length) and _same_extent(term, 3, length)


def _same_extent(term: Any, axis: int, length: Any) -> bool:
    return tvm_ffi.structural_equal(term.ty.shape[axis], length)


def _sum(terms: list[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = relax.op.add(total, term)
    return total


def _no_mask(call: relax.Call) -> Any:
    return relax.op.zeros(relax.ShapeExpr([1, 1, 1, call.ty.shape[1]]), "float32")
