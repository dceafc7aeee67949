"""Writes the fused operators of ONNX Runtime's own domain, com.microsoft, in plain ONNX operators.

    SkipLayerNormalization(x, y, gamma, beta)  →  LayerNormalization(x + y, gamma, beta)
    Attention(x, w, b, mask)                   →  MatMul, Add, Split, … Softmax, MatMul

ONNX Runtime's transformer optimizer writes them, and so do its quantizers and model builders. One
function a row of `ROWS`; what an operator says that its row does not know is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from bertile.base.errors import ModelError
from bertile.onnx import rewrites
from bertile.onnx.graph import OnnxGraph, Sizes, attributes
from bertile.onnx.inputs import input_specs, tried_limits
from bertile.onnx.masks import places_mask
from bertile.onnx.probing import Probes, probe

DOMAIN = "com.microsoft"
OPSET = 20
# ONNX Runtime has these without a domain, in which the standard has none of the name.
UNNAMED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


def expand(graph: OnnxGraph, opset: int, batch: int | None, length: int | None) -> int:
    """Rewrite them in place; return the opset that the graph is of then.

    `batch` and `length` are the sizes of static axes. Raises ModelError for an operator with
    inputs or attributes that cannot be written so; others of the domain are left.
    """
    if not any(map(_row, graph.nodes)):
        return opset
    opset = max(opset, OPSET)
    rewrites.upgrade_reductions(graph)
    rewrites.upgrade_splits(graph)
    _expand(graph, None, LOOKUPS)  # whose tables tell what ids there are
    if any(map(_row, graph.nodes)):
        inputs = tried_limits(graph, input_specs(graph), opset, batch, length)
        _expand(graph, probe(graph, inputs, opset, batch, length), ROWS)
    return opset


def rounds(node: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime rounds what this node reads to 8 bits."""
    integers = _row(node) is not None and attributes(node).get("accuracy_level", 0) == 4
    return node.op_type == "MatMulNBits" and integers


def note(graph: OnnxGraph) -> tuple[str, ...]:
    """What a person is told of weights that become floats."""
    bits = {
        attributes(node).get("bits", 4)
        for node in graph.nodes
        if _row(node) is not None and node.op_type == "MatMulNBits"
    }
    return tuple(f"weights of {n} bits (MatMulNBits) became float32" for n in sorted(bits))


def _row(node: onnx.NodeProto) -> Row | None:
    known = node.domain == DOMAIN or (node.op_type in UNNAMED and node.domain in ("", "ai.onnx"))
    return ROWS.get(node.op_type) if known else None


def _expand(graph: OnnxGraph, probes: Probes | None, rows: Mapping[str, Row]) -> None:
    for node in list(graph.nodes):
        if _row(node) is None or node.op_type not in rows:
            continue
        results = rows[node.op_type](Fused(graph, node, probes))
        read = {name for other in graph.nodes for name in other.input} | set(graph.outputs)
        for place, name in enumerate(node.output):
            result = results[place] if place < len(results) else ""
            if result:
                if probes is not None and (values := probes.of(name)) is not None:
                    probes.learn(result, values)
                graph.replace(name, result)
            elif name and name in read:
                raise _refused(node, f"its output '{name}' is read")
    graph.clean()


def _refused(node: onnx.NodeProto, why: str) -> ModelError:
    return ModelError(
        f"operator {DOMAIN}.{node.op_type} (node '{node.name or node.output[0]}') cannot be"
        f" imported: {why}",
        "export the model without a runtime's own optimizations",
    )


class Fused:
    """One node that is written anew: its operands and attributes by number and name."""

    def __init__(self, graph: OnnxGraph, node: onnx.NodeProto, probes: Probes | None) -> None:
        self.graph, self.node = graph, node
        self.sizes: Sizes = probes.sizes if probes is not None else lambda name: None
        self.options: dict[str, Any] = attributes(node)
        self.add, self.number, self.integers = graph.add, graph.number, graph.integers

    def operand(self, place: int) -> str:
        """The name of an operand, "" where it is absent."""
        return self.node.input[place] if place < len(self.node.input) else ""

    def rank(self, name: str) -> int:
        """How many axes a tensor has."""
        if self.graph.is_constant(name):
            return len(self.graph.shape(name))
        sizes = self.sizes(name)
        if sizes is None:
            raise _refused(self.node, f"the shape of '{name}' is not known")
        return len(sizes)

    def width(self, name: str, axis: int = -1) -> int:
        """The size of an axis that is always the same."""
        sizes = list(self.graph.shape(name)) if self.graph.is_constant(name) else self.sizes(name)
        size = sizes[axis] if sizes else None
        if not isinstance(size, int):
            raise _refused(self.node, f"the shape of '{name}' is not known")
        return size

    def without(self, *places: int, **neutral: Any) -> None:
        """Refuse operands, and attributes that are not what changes nothing."""
        for place in places:
            if self.operand(place):
                raise _refused(self.node, f"it reads '{self.operand(place)}' as operand {place}")
        for name, value in neutral.items():
            if self.options.get(name, value) != value:
                raise _refused(self.node, f"its {name} is {self.options[name]}")

    def summed(self, *names: str) -> str:
        """The sum of what is there."""
        total, *rest = [name for name in names if name]
        for name in rest:
            total = self.add("Add", [total, name])
        return total

    def constant(self, place: int) -> np.ndarray:
        """The value of an operand that must be a weight."""
        name = self.operand(place)
        if not self.graph.is_constant(name):
            raise _refused(self.node, f"its operand {place} ('{name}') is computed")
        return self.graph.array(name)


Row = Callable[[Fused], list[str]]


def _gelu(node: Fused) -> list[str]:
    return [_erf_gelu(node, node.operand(0))]


def _bias_gelu(node: Fused) -> list[str]:
    return [_erf_gelu(node, node.summed(node.operand(0), node.operand(1)))]


def _erf_gelu(node: Fused, x: str) -> str:
    add, number = node.add, node.number
    inner = add("Add", [add("Erf", [add("Div", [x, number(math.sqrt(2))])]), number(1)])
    return add("Mul", [add("Mul", [x, inner]), number(0.5)])


def _fast_gelu(node: Fused) -> list[str]:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))"""
    add, number = node.add, node.number
    x = node.summed(node.operand(0), node.operand(1))
    cube = add("Mul", [add("Pow", [x, number(3)]), number(0.044715)])
    inner = add("Mul", [add("Add", [x, cube]), number(math.sqrt(2 / math.pi))])
    outer = add("Add", [add("Tanh", [inner]), number(1)])
    return [add("Mul", [add("Mul", [x, number(0.5)]), outer])]


def _quick_gelu(node: Fused) -> list[str]:
    x, alpha = node.operand(0), node.options.get("alpha", 1.702)
    inner = x if alpha == 1 else node.add("Mul", [x, node.number(alpha)])
    return [node.add("Mul", [x, node.add("Sigmoid", [inner])])]


def _skip_layer_norm(node: Fused) -> list[str]:
    x, skip, gamma, beta, bias = map(node.operand, range(5))
    total = node.summed(x, bias, skip)
    return [_layer_norm(node, total, gamma, beta, 1e-12), "", "", total]


def _layer_norm(node: Fused, x: str, gamma: str, beta: str, epsilon: float) -> str:
    beta = beta or node.graph.constant(np.zeros(node.graph.shape(gamma), np.float32), "beta")
    epsilon = node.options.get("epsilon", epsilon)
    return node.add("LayerNormalization", [x, gamma, beta], axis=-1, epsilon=epsilon)


def _rms_norm(node: Fused) -> list[str]:
    node.without(axis=-1, stash_type=1)
    return [_rms(node, node.operand(0), node.operand(1))]


def _skip_rms_norm(node: Fused) -> list[str]:
    x, skip, gamma, bias = map(node.operand, range(4))
    total = node.summed(x, bias, skip)
    return [_rms(node, total, gamma), "", "", total]


def _rms(node: Fused, x: str, gamma: str, name: str = "epsilon") -> str:
    add = node.add
    square = add("ReduceMean", [add("Pow", [x, node.number(2)]), node.integers(-1)], keepdims=1)
    root = add("Sqrt", [add("Add", [square, node.number(node.options.get(name, 1e-5))])])
    return add("Mul", [gamma, add("Mul", [x, add("Reciprocal", [root])])])


def _embed_layer_norm(node: Fused) -> list[str]:
    """Lookups, LayerNorm, and how many tokens of a row are real."""
    add = node.add
    ids, types, words, table, type_table, gamma, beta, mask, places = map(node.operand, range(9))
    if places:
        looked_up = add("Gather", [table, places])
    else:  # the first rows of the table, one a token
        length = add("Shape", [ids], start=1, end=2)
        zero, unit = node.integers(0), node.integers(1)
        numbers = np.arange(node.graph.shape(table)[0], dtype=np.int64)[None]
        every = node.graph.constant(numbers, "positions")
        looked_up = add("Gather", [table, add("Slice", [every, zero, length, unit, unit])])
    of_types = add("Gather", [type_table, types]) if types else ""
    total = node.summed(add("Gather", [words, ids]), of_types, looked_up)
    counted = node.integers(1)
    real = mask or add("Mul", [ids, node.graph.constant(np.asarray(0, np.int64))])
    real = add("Cast", [real], to=onnx.TensorProto.INT32)
    count = add("ReduceSum", [real, counted], keepdims=0)
    return [_layer_norm(node, total, gamma, beta, 1e-12), count, total]


def _attention(node: Fused) -> list[str]:
    """Of x by one weight for Q, K and V; a mask by lengths, by keys or by pairs."""
    node.without(4, 6, do_rotary=0, past_present_share_buffer=0)
    x, weight, bias, mask, _, added, _ = map(node.operand, range(7))
    total = node.width(weight)
    sizes = node.options.get("qkv_hidden_sizes") or [total // 3] * 3
    product = node.summed(node.add("MatMul", [x, weight]), bias)
    heads = int(node.options["num_heads"])
    q, k, v = (_heads(node, part, heads) for part in _split(node, product, sizes))
    mask = _mask(node, mask) if mask else ""
    causal = bool(node.options.get("unidirectional", 0))
    return [_scored(node, q, k, v, sizes[0] // heads, [mask, added], causal)]


def _multi_head(node: Fused) -> list[str]:
    """Of Q, K and V, three tensors or packed in one, (batch, length, channels) or by heads."""
    node.without(6, 7, 8, 9)
    q, k, v, bias, mask, added = map(node.operand, range(6))
    heads = int(node.options["num_heads"])
    by_heads = [False] * 3
    if node.rank(q) == 5:  # (batch, length, heads, 3, width)
        width = value_width = node.width(q)
        parts = [_flat(node, _picked(node, q, 3, place), 2) for place in range(3)]
    else:
        width = node.width(q) // heads
        if k and node.rank(k) == 5:  # (batch, length, heads, 2, width)
            value_width = node.width(k)
            parts = [q, *(_flat(node, _picked(node, k, 3, place), 2) for place in range(2))]
        elif not k or not v:
            raise _refused(node.node, "it has no keys or values")
        else:
            parts, by_heads = [q, k, v], [node.rank(name) == 4 for name in (q, k, v)]
            value_width = node.width(v) if by_heads[2] else node.width(v) // heads
    if bias:
        biases = _split(node, bias, [heads * width, heads * width, heads * value_width])
        parts = [
            part if apart else node.add("Add", [part, own])
            for part, own, apart in zip(parts, biases, by_heads)
        ]
    q, k, v = (part if apart else _heads(node, part, heads) for part, apart in zip(parts, by_heads))
    mask = _mask(node, mask) if mask else ""
    causal = bool(node.options.get("unidirectional", 0))
    return [_scored(node, q, k, v, width, [mask, added], causal)]


def _grouped(node: Fused) -> list[str]:
    """Of more heads of Q than of K and V, causal, without a cache."""
    node.without(3, 4, 11, 12, 13)
    node.without(smooth_softmax=0, qk_output=0, sliding_window_cache=0)
    add, options = node.add, node.options
    q, k, v, _, _, last, _, cos, sin, places, added = map(node.operand, range(11))
    heads, groups = int(options["num_heads"]), int(options["kv_num_heads"])
    if k:
        width = node.width(q) // heads
    else:
        width = node.width(q) // (heads + 2 * groups)
        q, k, v = _split(node, q, [heads * width, groups * width, groups * width])
    q, k, v = (_heads(node, part, count) for part, count in ((q, heads), (k, groups), (v, groups)))
    q, k = (
        _rms(node, part, node.operand(place), "qk_norm_epsilon") if node.operand(place) else part
        for part, place in ((q, 14), (k, 15))
    )
    if options.get("do_rotary", 0):
        places = places or _places(node)
        turned = bool(options.get("rotary_interleaved", 0))
        q, k = (_turned(node, part, places, cos, sin, width, turned) for part in (q, k))
    if groups != heads:
        index = node.graph.constant(np.arange(heads) // (heads // groups), "groups")
        k, v = (add("Gather", [part, index], axis=1) for part in (k, v))
    window = int(options.get("local_window_size", -1))
    reach = (window - 1 if window > 0 else None, 0) if options.get("causal", 1) else (None, None)
    count = add("Add", [last, node.graph.constant(np.asarray(1, np.int32))])
    mask = _by_lengths(node, add("Reshape", [count, node.integers(-1)]))
    masks = [mask, added, places_mask(node.graph, reach) if reach[1] is not None else ""]
    return [_scored(node, q, k, v, width, masks, False, float(options.get("softcap", 0.0)))]


def _scored(
    node: Fused, q: str, k: str, v: str, width: int, masks: list[str], causal: bool, cap: float = 0
) -> str:
    """softmax(q · kᵀ · scale + masks) · v of (batch, heads, length, width), heads joined."""
    add = node.add
    scale = node.options.get("scale", 0.0) or 1 / math.sqrt(width)
    scores = add("MatMul", [q, add("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = add("Mul", [scores, node.number(scale)])
    if cap:
        scores = add(
            "Mul", [add("Tanh", [add("Div", [scores, node.number(cap)])]), node.number(cap)]
        )
    if causal:
        masks = [*masks, places_mask(node.graph, (None, 0))]
    for mask in filter(None, masks):
        scores = add("Add", [scores, mask])
    mixed = add("MatMul", [add("Softmax", [scores], axis=-1), v])
    return _flat(node, add("Transpose", [mixed], perm=[0, 2, 1, 3]), 2)


def _split(node: Fused, name: str, sizes: list[int]) -> list[str]:
    """Parts of these sizes of the last axis."""
    names = [node.graph.fresh("part") for _ in sizes]
    inputs = [name, node.integers(*sizes)]
    node.graph.nodes.append(onnx.helper.make_node("Split", inputs, names, names[0], axis=-1))
    return names


def _heads(node: Fused, name: str, heads: int) -> str:
    """(batch, length, channels) → (batch, heads, length, width)."""
    apart = node.add("Reshape", [name, node.integers(0, 0, heads, -1)])
    return node.add("Transpose", [apart], perm=[0, 2, 1, 3])


def _flat(node: Fused, name: str, first: int) -> str:
    """All axes from the one of this number on as one."""
    return node.add("Reshape", [name, node.integers(*([0] * first), -1)])


def _picked(node: Fused, name: str, axis: int, place: int) -> str:
    return node.add("Gather", [name, node.graph.constant(np.asarray(place, np.int64))], axis=axis)


def _mask(node: Fused, mask: str) -> str:
    """What is added to scores, of a mask of 1 at real keys or of how many keys are real."""
    rank = node.rank(mask)
    if rank == 1:
        sizes, batches = node.sizes(mask), node.sizes("input_ids")
        if sizes is None or batches is None or sizes[0] != batches[0]:
            raise _refused(node.node, f"its mask '{mask}' says where rows begin and end")
        return _by_lengths(node, mask)
    if rank not in (2, 3):
        raise _refused(node.node, f"its mask '{mask}' has {rank} axes")
    number = node.add("Cast", [mask], to=onnx.TensorProto.FLOAT)
    number = node.add("Unsqueeze", [number, node.integers(*((1, 2) if rank == 2 else (1,)))])
    return _closing(node, number)


def _by_lengths(node: Fused, count: str) -> str:
    """Of (batch,) numbers of real keys: those behind them are closed."""
    add = node.add
    places = _places(node)
    counts = add("Unsqueeze", [add("Cast", [count], to=onnx.TensorProto.INT64), node.integers(1)])
    real = add("Cast", [add("Less", [places, counts])], to=onnx.TensorProto.FLOAT)
    return _closing(node, add("Unsqueeze", [real, node.integers(1, 2)]))


def _places(node: Fused) -> str:
    """0, 1, 2, … of the tokens of each row, (batch, length) as those of the ids."""
    add = node.add
    ones = add("Cast", [add("Equal", ["input_ids", "input_ids"])], to=onnx.TensorProto.INT64)
    unit = node.graph.constant(np.asarray(1, np.int64))
    return add("Sub", [add("CumSum", [ones, unit]), unit])


def _closing(node: Fused, real: str) -> str:
    filter_value = node.options.get("mask_filter_value", -10000.0)
    closed = node.add("Sub", [node.number(1), real])
    return node.add("Mul", [closed, node.number(filter_value)])


def _rotary(node: Fused) -> list[str]:
    """Each head's channels turned by the angles of its token's place."""
    node.without(is_packed_batching=0)
    x, places, cos, sin = map(node.operand, range(4))
    by_heads = node.rank(x) == 4
    part = int(node.options.get("rotary_embedding_dim", 0))
    heads = int(node.options.get("num_heads", 0))
    if by_heads:
        width = node.width(x)
    else:
        width = node.width(x) // heads if heads else part or 2 * node.width(cos)
        x = _heads(node, x, node.width(x) // width)
    if node.rank(places) == 1:  # where the first token stands
        places = node.add("Add", [_places(node), places])
    turned = bool(node.options.get("interleaved", 0))
    scale = node.options.get("scale", 1.0)
    if scale != 1.0:
        raise _refused(node.node, f"its scale is {scale:g}")
    result = _turned(node, x, places, cos, sin, width, turned, part or 2 * node.width(cos))
    if not by_heads:
        result = _flat(node, node.add("Transpose", [result], perm=[0, 2, 1, 3]), 2)
    return [result]


def _turned(
    node: Fused,
    x: str,
    places: str,
    cos: str,
    sin: str,
    width: int,
    interleaved: bool,
    part: int | None = None,
) -> str:
    """(batch, heads, length, width) whose first `part` channels are turned, in pairs of halves or,
    `interleaved`, of neighbours.
    """
    add, part = node.add, part or 2 * node.width(cos)
    x, rest = _split(node, x, [part, width - part]) if part < width else (x, "")
    order = np.arange(part)
    pairs = order // 2 if interleaved else order % (part // 2)
    cos, sin = (_angles(node, name, places, pairs, part) for name in (cos, sin))
    if interleaved:
        index = node.graph.constant(order ^ 1, "neighbours")
        signs = np.where(order % 2, 1, -1).astype(np.float32)
        other = add("Mul", [add("Gather", [x, index], axis=3), node.graph.constant(signs)])
    else:
        first, second = _split(node, x, [part // 2] * 2)
        other = add("Concat", [add("Neg", [second]), first], axis=-1)
    turned = add("Add", [add("Mul", [x, cos]), add("Mul", [other, sin])])
    return add("Concat", [turned, rest], axis=-1) if rest else turned


def _angles(node: Fused, table: str, places: str, pairs: np.ndarray, part: int) -> str:
    """(batch, 1, length, part) of a table (positions, part / 2), for each channel of a head."""
    if node.graph.is_constant(table):
        whole = node.graph.array(table)[:, pairs]
        wide = node.graph.constant(whole, "angles")
    else:
        wide = node.add("Gather", [table, node.graph.constant(pairs, "pairs")], axis=1)
    return node.add("Unsqueeze", [node.add("Gather", [wide, places]), node.integers(1)])


def _product_of_bits(node: Fused) -> list[str]:
    """x by a weight in 2, 4 or 8 bits by blocks of inputs, which becomes floats."""
    node.without(4, weight_prepacked=0)
    options = node.options
    inputs, outputs = int(options["K"]), int(options["N"])
    bits, block = int(options.get("bits", 4)), int(options["block_size"])
    packed, scales = node.constant(1), node.constant(2)
    blocks = -(-inputs // block)
    values = _unpacked(packed.reshape(outputs, blocks, -1), bits).astype(np.float32)
    zeros: Any = float(1 << (bits - 1))
    if node.operand(3):
        zeros = node.constant(3)
        if zeros.dtype == np.uint8:
            zeros = _unpacked(zeros.reshape(outputs, -1), bits)[:, :blocks]
        zeros = zeros.astype(np.float32).reshape(outputs, blocks, 1)
    weight = (values - zeros) * scales.astype(np.float32).reshape(outputs, blocks, 1)
    weight = weight.reshape(outputs, -1)[:, :inputs]
    name = node.graph.constant(np.ascontiguousarray(weight.T), "weight")
    return [node.summed(node.add("MatMul", [node.operand(0), name]), node.operand(5))]


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of so many bits, the lowest of a byte first, along the last axis."""
    shifts = np.arange(0, 8, bits)
    apart = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return apart.reshape(*packed.shape[:-1], -1)


def _fused_product(node: Fused) -> list[str]:
    """A product of transposed or scaled operands."""
    node.without(transBatchA=0, transBatchB=0)
    names = []
    for place, option in enumerate(("transA", "transB")):
        name = node.operand(place)
        if node.options.get(option, 0):
            rank = node.rank(name)
            order = [*range(rank - 2), rank - 1, rank - 2]
            name = node.add("Transpose", [name], perm=order)
        names.append(name)
    product, alpha = node.add("MatMul", names), node.options.get("alpha", 1.0)
    return [product if alpha == 1 else node.add("Mul", [product, node.number(alpha)])]


def _fused_gemm(node: Fused) -> list[str]:
    """A Gemm with what comes behind it."""
    options = dict(node.options)
    activation = options.pop("activation", b"").decode()
    numbers = [name for name in options if name.startswith("activation_")]
    if activation not in ("Relu", "Sigmoid", "Tanh") or numbers:
        raise _refused(node.node, f"its activation is {activation}")
    return [node.add(activation, [node.add("Gemm", node.node.input, **options)])]


LOOKUPS: dict[str, Row] = {"EmbedLayerNormalization": _embed_layer_norm}
ROWS: dict[str, Row] = {
    **LOOKUPS,
    "Attention": _attention,
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_product,
    "Gelu": _gelu,
    "GroupQueryAttention": _grouped,
    "MatMulNBits": _product_of_bits,
    "MultiHeadAttention": _multi_head,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
