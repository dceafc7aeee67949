"""Rewrites that give the attention of every exporter one spelling.

    softmax(MatMul(q * a, Reshape(Transpose(Reshape(k))) * b) + mask), NaN replaced by 0
    →  softmax(MatMul(q, Transpose(k)) * (a * b) + mask)

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx

from bertile.onnx.graph import OnnxGraph, Sizes, attributes
from bertile.onnx.masks import places_mask


def expand_attention(graph: OnnxGraph, is_bool: Callable[[str], bool]) -> None:
    """Attention(q, k, v, mask) of opset 23 → MatMul, Mul, Add or Where, Softmax, MatMul.

    TVM's importer reads the node as the fused operator of ONNX Runtime that has the same name.
    Only the 4-D form (batch, heads, length, width) without a cache is expanded.
    """
    for node in list(graph.nodes):
        if node.op_type != "Attention" or node.domain or len([o for o in node.output if o]) > 1:
            continue
        options = attributes(node)
        mask = node.input[3] if len(node.input) > 3 else ""
        unusual = any(node.input[4:]) or options.get("softcap")
        if unusual or "scale" not in options or "q_num_heads" in options:
            continue
        keys = graph.add("Transpose", [node.input[1]], perm=[0, 1, 3, 2])
        scores = graph.add("MatMul", [node.input[0], keys])
        scores = graph.add("Mul", [scores, graph.number(options["scale"])])
        if mask and is_bool(mask):
            scores = graph.add("Where", [mask, scores, graph.number(float("-inf"))])
        elif mask:
            scores = graph.add("Add", [scores, mask])
        if options.get("is_causal"):
            scores = graph.add("Add", [scores, places_mask(graph, (None, 0))])
        weights = graph.add("Softmax", [scores], axis=-1)
        graph.replace(node.output[0], graph.add("MatMul", [weights, node.input[2]]))
    graph.clean()


def unfold_softmax(graph: OnnxGraph, sizes: Sizes) -> None:
    """Reshape(Softmax(Flatten(x))) → Softmax(x): what opset 12 becomes when brought to 13."""
    producers = graph.producers()
    for node in list(graph.nodes):
        softmax = producers.get(node.input[0]) if node.op_type == "Reshape" else None
        flatten = producers.get(softmax.input[0]) if softmax is not None else None
        if flatten is None or (softmax.op_type, flatten.op_type) != ("Softmax", "Flatten"):
            continue
        whole = sizes(flatten.input[0])
        last = attributes(softmax).get("axis", -1) == -1
        if whole is None or not last or sizes(node.output[0]) != whole:
            continue
        if attributes(flatten).get("axis", 1) == len(whole) - 1:
            unfolded = graph.add("Softmax", [flatten.input[0]], axis=-1)
            graph.replace(node.output[0], unfolded)
    graph.clean()


def drop_nan_guards(graph: OnnxGraph) -> None:
    """Where(IsNaN(softmax), 0, softmax) → softmax, right where no mask holds an infinity."""
    producers = graph.producers()
    for node in list(graph.nodes):
        guard = producers.get(node.input[0]) if node.op_type == "Where" else None
        source = producers.get(node.input[2]) if guard is not None else None
        if source is None or (guard.op_type, source.op_type) != ("IsNaN", "Softmax"):
            continue
        if guard.input[0] == node.input[2]:
            graph.replace(node.output[0], node.input[2])
    graph.clean()


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
    before, merged, after = (
        sizes(name) for name in (merge.input[0], swap.input[0], node.output[0])
    )
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
    for matmul in [node for node in graph.nodes if node.op_type == "MatMul"]:
        producers, consumers = graph.producers(), graph.consumers()
        if not _reaches_softmax(matmul.output[0], consumers):
            continue
        factor = 1.0
        for place, name in enumerate(matmul.input):
            scaled = _scaled(graph, producers.get(name))
            if scaled is not None:
                matmul.input[place] = scaled[0]
                factor *= scaled[1]
        last = matmul.output[0]
        after = consumers[last][0]
        scaled = _scaled(graph, after)
        if scaled is not None:
            factor *= scaled[1]
            last = after.output[0]
        elif factor == 1.0:
            continue
        inner = graph.fresh("scores")
        matmul.output[0] = inner
        graph.replace(last, graph.add("Mul", [inner, graph.number(_root(factor))]))
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
