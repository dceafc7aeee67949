"""Rewrites of an ONNX graph that need its structure alone: each brings one spelling to Bertile's.

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

import numpy as np
import onnx

from bertile.onnx_graph import OnnxGraph, attributes

_ERF = np.vectorize(math.erf, otypes=[np.float64])
_POINTS = np.linspace(-4.0, 4.0, 33)
_GELU = {
    "none": _POINTS * 0.5 * (1 + _ERF(_POINTS / math.sqrt(2))),
    "tanh": _POINTS * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3))),
}
# A tensor's axes by its name: an int, or anything that is equal only to itself; None if unknown.
Sizes = Callable[[str], Optional[list]]

_ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Erf": _ERF,
    "Tanh": np.tanh,
}


def upgrade_reductions(graph: OnnxGraph) -> None:
    """Reduce*(x, axes=[-1]) → Reduce*(x, [-1]): opset 18 made the attribute an input."""
    for node in graph.nodes:
        if not node.op_type.startswith("Reduce") or len(node.input) > 1:
            continue
        axes = attributes(node).get("axes")
        if axes is not None:
            node.input.append(graph.constant(np.asarray(axes, np.int64)))
            kept = [one for one in node.attribute if one.name != "axes"]
            del node.attribute[:]
            node.attribute.extend(kept)


def upgrade_splits(graph: OnnxGraph) -> None:
    """Split(x) → Split(x, num_outputs=n): opset 18 wants the number where sizes are absent."""
    for node in graph.nodes:
        known = len(node.input) > 1 or "num_outputs" in attributes(node)
        if node.op_type == "Split" and not known:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))


def drop_inference_no_ops(graph: OnnxGraph) -> None:
    """Dropout(x) → x."""
    for node in list(graph.nodes):
        if node.op_type == "Dropout":
            graph.replace(node.output[0], node.input[0])
    graph.clean()


def expand_attention(graph: OnnxGraph, is_bool: Callable[[str], bool]) -> None:
    """Attention(q, k, v, mask) of opset 23 → MatMul, Mul, Add or Where, Softmax, MatMul.

    TVM's importer reads the node as the fused operator of ONNX Runtime that has the same name.
    Only the 4-D form (batch, heads, length, width) without a cache is expanded.
    """
    for node in list(graph.nodes):
        if node.op_type != "Attention" or node.domain or len([o for o in node.output if o]) > 1:
            continue
        given = attributes(node)
        mask = node.input[3] if len(node.input) > 3 else ""
        unusual = any(node.input[4:]) or given.get("is_causal") or given.get("softcap")
        if unusual or "scale" not in given or "q_num_heads" in given:
            continue
        keys = graph.add("Transpose", [node.input[1]], perm=[0, 1, 3, 2])
        scores = graph.add("MatMul", [node.input[0], keys])
        scores = graph.add("Mul", [scores, _number(graph, given["scale"])])
        if mask and is_bool(mask):
            scores = graph.add("Where", [mask, scores, _number(graph, float("-inf"))])
        elif mask:
            scores = graph.add("Add", [scores, mask])
        weights = graph.add("Softmax", [scores], axis=-1)
        graph.replace(node.output[0], graph.add("MatMul", [weights, node.input[2]]))
    graph.clean()


def drop_nan_guards(graph: OnnxGraph) -> None:
    """Where(IsNaN(softmax), 0, softmax) → softmax: with a finite mask no row is all -inf."""
    producers = graph.producers()
    for node in list(graph.nodes):
        guard = producers.get(node.input[0]) if node.op_type == "Where" else None
        if guard is None or guard.op_type != "IsNaN" or guard.input[0] != node.input[2]:
            continue
        source = producers.get(node.input[2])
        if source is not None and source.op_type == "Softmax" and _by_canonical_mask(source, producers):
            graph.replace(node.output[0], node.input[2])
    graph.clean()


def _by_canonical_mask(softmax: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Say whether nothing infinite is added to the scores: only Bertile's own mask, if any."""
    scores = producers.get(softmax.input[0])
    while scores is not None and scores.op_type in ("Add", "Where"):
        if scores.op_type == "Where":
            return False
        added = [name for name in scores.input if name.startswith("bertile.mul.")]
        if added:
            return True
        scores = producers.get(scores.input[0])
    return True


def merge_transposes(graph: OnnxGraph, sizes: Sizes) -> None:
    """Transpose(Transpose(x)) → Transpose(x), also through a merge and split of batch and heads.

    torch writes k.transpose(-2, -1) as Reshape to (batch * heads, length, width), Transpose,
    Reshape back.
    """
    producers = graph.producers()
    for node in list(graph.nodes):
        if node.op_type == "Reshape":
            _unfold_transpose(node, producers, sizes)
    graph.clean()
    producers = graph.producers()
    for node in graph.nodes:
        before = producers.get(node.input[0]) if node.op_type == "Transpose" else None
        if before is not None and before.op_type == "Transpose":
            inner, outer = attributes(before).get("perm"), attributes(node).get("perm")
            if inner is not None and outer is not None:
                _set_perm(node, before.input[0], [inner[axis] for axis in outer])
    graph.clean()


def _unfold_transpose(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], sizes: Sizes
) -> None:
    swap = producers.get(node.input[0])
    merge = producers.get(swap.input[0]) if swap is not None else None
    if swap is None or merge is None or (swap.op_type, merge.op_type) != ("Transpose", "Reshape"):
        return
    before, merged, after = (sizes(one) for one in (merge.input[0], swap.input[0], node.output[0]))
    if attributes(swap).get("perm") != [0, 2, 1] or None in (before, merged, after):
        return
    # The last two axes stay through the merge, the first two through the whole.
    if len(before) == 4 and merged[1:] == before[2:] and after == [*before[:2], *merged[:0:-1]]:
        node.op_type = "Transpose"
        del node.input[1:]
        _set_perm(node, merge.input[0], [0, 1, 3, 2])


def _set_perm(node: onnx.NodeProto, source: str, perm: list[int]) -> None:
    node.input[0] = source
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("perm", perm))


def scale_scores(graph: OnnxGraph) -> None:
    """MatMul(q * a, k * b) → MatMul(q, k) * (a * b), and a division by a constant likewise.

    Only before a softmax, where it costs nothing and gives attention one spelling.
    """
    for matmul in [one for one in graph.nodes if one.op_type == "MatMul"]:
        producers, consumers = graph.producers(), graph.consumers()
        if not _reaches_softmax(matmul.output[0], consumers):
            continue
        factor = 1.0
        for place, name in enumerate(matmul.input):
            found = _scaled(graph, producers.get(name))
            if found is not None:
                matmul.input[place] = found[0]
                factor *= found[1]
        last = matmul.output[0]
        after = consumers[last][0]
        found = _scaled(graph, after)
        if found is not None:
            factor *= found[1]
            last = after.output[0]
        elif factor == 1.0:
            continue
        inner = graph.fresh("scores")
        matmul.output[0] = inner
        graph.replace(last, graph.add("Mul", [inner, _number(graph, _root(factor))]))
    graph.clean()


def _root(factor: float) -> float:
    """Return 1 / sqrt(width) exactly where two rounded fourth roots were multiplied to it."""
    exact = 1 / math.sqrt(max(1, round(factor**-2))) if factor > 0 else factor
    return exact if abs(exact / factor - 1) < 1e-6 else factor


def _reaches_softmax(name: str, consumers: dict[str, list[onnx.NodeProto]]) -> bool:
    for _ in range(4):
        after = consumers.get(name, [])
        if len(after) != 1:
            return False
        if after[0].op_type == "Softmax":
            return True
        if after[0].op_type not in ("Add", "Mul", "Div", "Where"):
            return False
        name = after[0].output[0]
    return False


def _scaled(graph: OnnxGraph, node: onnx.NodeProto | None) -> tuple[str, float] | None:
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    first, second = (graph.scalar(name) for name in node.input)
    if second is not None:
        return node.input[0], second if node.op_type == "Mul" else 1.0 / second
    if first is not None and node.op_type == "Mul":
        return node.input[1], first
    return None


def drop_expands(graph: OnnxGraph, sizes: Sizes) -> None:
    """Add(Expand(x), y) → Add(x, y) where y has the whole shape already."""
    for node in [one for one in graph.nodes if one.op_type == "Expand"]:
        name = node.output[0]
        readers = graph.consumers().get(name, [])
        whole = sizes(name)
        if name in graph.outputs or whole is None:
            continue
        others = [next((o for o in one.input if o != name), "") for one in readers]
        broadcast = all(one.op_type in ("Add", "Sub", "Mul") for one in readers)
        if readers and broadcast and all(sizes(other) == whole for other in others):
            graph.replace(name, node.input[0])
    graph.clean()


def write_reshapes(graph: OnnxGraph, sizes: Sizes) -> None:
    """Reshape(x, Concat(Shape(x)[0], …)) → Reshape(x, [0, 0, 2, 64]), or x if no axis changes."""
    for node in list(graph.nodes):
        if node.op_type != "Reshape":
            continue
        before, after = sizes(node.input[0]), sizes(node.output[0])
        target = reshape_target(before, after)
        if target is not None and before == after:
            graph.replace(node.output[0], node.input[0])
        elif target is not None:
            node.input[1] = graph.constant(np.asarray(target, np.int64), "shape")
            del node.attribute[:]
    graph.clean()


def reshape_target(before: list[object] | None, after: list[object] | None) -> list[int] | None:
    """Return Reshape's target for these shapes, or None where 0 and one -1 cannot say it.

    A size is an int, or anything else that is equal only to itself where it varies.
    """
    if before is None or after is None:
        return None
    target = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and before[axis] == size:
            target.append(0)
        elif -1 not in target:
            target.append(-1)
        else:
            return None
    return target


def name_weights(graph: OnnxGraph) -> None:
    """Call the weight of a product "x.weight" where the bias added to it is "x.bias"."""
    producers = graph.producers()
    for node in graph.nodes:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((producers[name] for name in node.input if name in producers), None)
        if node.op_type != "Add" or bias is None or product is None or product.op_type != "MatMul":
            continue
        wanted = bias[: -len("bias")] + "weight"
        if graph.is_constant(product.input[1]) and not graph.is_constant(wanted):
            graph.rename_constant(product.input[1], wanted)


def split_gemms(graph: OnnxGraph) -> None:
    """Gemm(x, w, b) with its weight in either layout → Add(MatMul(x, w as [in, out]), b)."""
    for node in list(graph.nodes):
        given = attributes(node)
        plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA")
        if node.op_type != "Gemm" or not plain or not graph.is_constant(node.input[1]):
            continue
        weight = node.input[1]
        if given.get("transB"):
            transposed = np.ascontiguousarray(graph.array(weight).T)
            weight = graph.set_constant(f"{weight}.transposed", transposed)
        made = graph.add("MatMul", [node.input[0], weight])
        if len(node.input) > 2 and node.input[2]:
            made = graph.add("Add", [made, node.input[2]])
        graph.replace(node.output[0], made)
    graph.clean()


def transpose_weights(graph: OnnxGraph) -> None:
    """MatMul(x, Transpose(weight)) → MatMul(x, weight as [in, out])."""
    for node in list(graph.nodes):
        if node.op_type == "Transpose" and graph.is_constant(node.input[0]):
            name, array = node.input[0], graph.array(node.input[0])
            value = np.ascontiguousarray(np.transpose(array, attributes(node).get("perm")))
            graph.replace(node.output[0], graph.set_constant(f"{name}.transposed", value))
    graph.clean()


def fuse_layer_norms(graph: OnnxGraph) -> None:
    """(x - mean) / Sqrt(mean((x - mean)^2) + eps) * weight + bias → LayerNormalization."""
    producers, consumers = graph.producers(), graph.consumers()
    for division in [one for one in graph.nodes if one.op_type == "Div"]:
        found = _normalized(graph, division, producers)
        product = _only(consumers.get(division.output[0]), "Mul")
        total = _only(consumers.get(product.output[0]), "Add") if product is not None else None
        if found is None or total is None:
            continue
        weight = _constant_vector(graph, product, division.output[0])
        bias = _constant_vector(graph, total, product.output[0])
        if weight is None or bias is None:
            continue
        source, epsilon = found
        made = graph.add(
            "LayerNormalization", [source, weight, bias], axis=-1, epsilon=epsilon
        )
        graph.replace(total.output[0], made)
    graph.clean()


def _normalized(
    graph: OnnxGraph, division: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> tuple[str, float] | None:
    centred, root = (producers.get(name) for name in division.input)
    if centred is None or root is None or (centred.op_type, root.op_type) != ("Sub", "Sqrt"):
        return None
    mean, shifted = producers.get(centred.input[1]), producers.get(root.input[0])
    if mean is None or shifted is None or shifted.op_type != "Add":
        return None
    epsilon = next((e for e in map(graph.scalar, shifted.input) if e is not None), None)
    variance = next((producers[name] for name in shifted.input if name in producers), None)
    if epsilon is None or variance is None:
        return None
    if not (_over_last(graph, mean) and _over_last(graph, variance)):
        return None
    square = producers.get(variance.input[0])
    if square is None or square.input[0] != centred.output[0] or mean.input[0] != centred.input[0]:
        return None
    power = square.op_type == "Pow" and graph.scalar(square.input[1]) == 2.0
    product = square.op_type == "Mul" and square.input[1] == square.input[0]
    return (centred.input[0], epsilon) if power or product else None


def _over_last(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    if node.op_type != "ReduceMean" or not attributes(node).get("keepdims", 1):
        return False
    return len(node.input) > 1 and graph.scalar(node.input[1]) == -1.0


def _only(nodes: list[onnx.NodeProto] | None, op: str) -> onnx.NodeProto | None:
    return nodes[0] if nodes and len(nodes) == 1 and nodes[0].op_type == op else None


def _constant_vector(graph: OnnxGraph, node: onnx.NodeProto, other: str) -> str | None:
    for name in node.input:
        if name != other and graph.is_constant(name) and len(graph.shape(name)) == 1:
            return name
    return None


def fuse_gelus(graph: OnnxGraph) -> None:
    """Any arithmetic around an Erf or Tanh that equals GELU of one tensor → Gelu."""
    for start in [one for one in graph.nodes if one.op_type in ("Erf", "Tanh")]:
        producers, consumers = graph.producers(), graph.consumers()
        if start.output[0] not in producers:
            continue
        end = start
        for _ in range(4):
            end = next(iter(consumers.get(end.output[0], [])), None)
            if end is None or end.op_type not in ("Add", "Mul"):
                break
            kind, source = _is_gelu(graph, end, start, producers)
            if kind is not None:
                made = graph.add("Gelu", [source], approximate=kind)
                graph.replace(end.output[0], made)
                break
    graph.clean()


def _is_gelu(
    graph: OnnxGraph, end: onnx.NodeProto, start: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> tuple[str | None, str]:
    for source in _sources(graph, start, producers):
        value = _evaluate(graph, end.output[0], source, producers, depth=12)
        for kind, want in _GELU.items():
            if value is not None and np.abs(value - want).max() < 2e-6:
                return kind, source
    return None, ""


def _sources(
    graph: OnnxGraph, start: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> list[str]:
    """Return the tensors before `start` through elementwise nodes, the nearest first."""
    found, queue = [], list(start.input)
    while queue and len(found) < 8:
        name = queue.pop(0)
        if graph.is_constant(name) or name in found:
            continue
        found.append(name)
        if name in producers and producers[name].op_type in _ELEMENTWISE:
            queue.extend(producers[name].input)
    return found


def _evaluate(
    graph: OnnxGraph, name: str, source: str, producers: dict[str, onnx.NodeProto], depth: int
) -> np.ndarray | None:
    """Compute tensor `name` as a function of tensor `source` at a few points."""
    if name == source:
        return _POINTS
    if graph.is_constant(name):
        scalar = graph.scalar(name)
        return None if scalar is None else np.asarray(scalar)
    node = producers.get(name)
    if node is None or node.op_type not in _ELEMENTWISE or depth == 0:
        return None
    values = [_evaluate(graph, one, source, producers, depth - 1) for one in node.input]
    if any(one is None for one in values):
        return None
    return _ELEMENTWISE[node.op_type](*values)


def _number(graph: OnnxGraph, value: float) -> str:
    return graph.constant(np.asarray(value, np.float32))
