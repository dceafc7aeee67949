"""Brings products, reshapes and reductions of an ONNX graph to one spelling.

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, Sizes, attributes

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # they keep the order of elements


def upgrade_reductions(graph: OnnxGraph) -> None:
    """Reduce*(x, axes=[-1]) → Reduce*(x, [-1]): opset 18 made the attribute an input."""
    for node in graph.nodes:
        if not node.op_type.startswith("Reduce") or len(node.input) > 1:
            continue
        axes = attributes(node).get("axes")
        if axes is not None:
            node.input.append(graph.constant(np.asarray(axes, np.int64)))
            kept = [attribute for attribute in node.attribute if attribute.name != "axes"]
            del node.attribute[:]
            node.attribute.extend(kept)


def upgrade_splits(graph: OnnxGraph) -> None:
    """Split(x) → Split(x, num_outputs=n): opset 18 wants the number where sizes are absent."""
    for node in graph.nodes:
        known = len(node.input) > 1 or "num_outputs" in attributes(node)
        if node.op_type == "Split" and not known:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))


def drop_dropouts(graph: OnnxGraph) -> None:
    """Dropout(x) → x."""
    for node in list(graph.nodes):
        if node.op_type == "Dropout":
            graph.replace(node.output[0], node.input[0])
    graph.clean()


def write_reshapes(graph: OnnxGraph, sizes: Sizes) -> None:
    """Reshape(x, Concat(Shape(x)[0], …)) → Reshape(x, [0, 0, 2, 64]), or x if no axis changes.

    Of several reshapes in a row the last is left.
    """
    producers = graph.producers()
    for node in list(graph.nodes):
        after = sizes(node.output[0])
        if node.op_type in RESHAPES[1:] and after is not None:
            same = (
                name
                for name, kind in _before_reshapes(producers, node.output[0])
                if kind is None and sizes(name) == after
            )
            if source := next(same, None):
                graph.replace(node.output[0], source)
        if node.op_type != "Reshape":
            continue
        for source, kind in _before_reshapes(producers, node.input[0]):
            if kind is not None and sizes(source) == after:
                graph.rewrite(node.output[0], "Cast", [source], to=kind)
                break
            if kind is None and reshape_target(sizes(source), after) is not None:
                node.input[0] = source
        before = sizes(node.input[0])
        target = reshape_target(before, after)
        if target is not None and before == after:
            graph.replace(node.output[0], node.input[0])
        elif target is not None:
            node.input[1] = graph.constant(np.asarray(target, np.int64), "shape")
            del node.attribute[:]
    graph.clean()


def _before_reshapes(
    producers: dict[str, onnx.NodeProto], name: str
) -> Iterator[tuple[str, int | None]]:
    """The tensors that have the same elements as a tensor in the same order, the nearest first,
    and the type that they are cast to.
    """
    kind = None
    while (node := producers.get(name)) is not None:
        if node.op_type == "Cast" and kind is None:
            kind = attributes(node)["to"]
        elif node.op_type not in RESHAPES:
            return
        name = node.input[0]
        yield name, kind


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


def drop_expands(graph: OnnxGraph, sizes: Sizes) -> None:
    """Add(Expand(x), y) → Add(x, y) where y has the whole shape already."""
    for expand in [node for node in graph.nodes if node.op_type == "Expand"]:
        name = expand.output[0]
        readers = graph.consumers().get(name, [])
        whole = sizes(name)
        if name in graph.outputs or whole is None:
            continue
        others = [next((o for o in reader.input if o != name), "") for reader in readers]
        broadcast = all(reader.op_type in ("Add", "Sub", "Mul") for reader in readers)
        if readers and broadcast and all(sizes(other) == whole for other in others):
            graph.replace(name, expand.input[0])
    graph.clean()


def join_copies(graph: OnnxGraph, sizes: Sizes) -> None:
    """Expand(x, [1, …, n]) → Concat(x, x, …) where an axis varies whose 1 says that it stays: of
    the shape of such an Expand TVM knows nothing.
    """
    for node in [node for node in graph.nodes if node.op_type == "Expand"]:
        after = sizes(node.output[0])
        if after is None or not graph.is_constant(node.input[1]):
            continue
        target = graph.array(node.input[1])
        if len(target) != len(after):
            continue
        grown = [axis for axis, size in enumerate(target) if size != 1]
        varies = any(not isinstance(size, int) for size in after)
        if varies and len(grown) == 1 and sizes(node.input[0]) == _with(after, grown[0], 1):
            copies = [node.input[0]] * int(target[grown[0]])
            graph.rewrite(node.output[0], "Concat", copies, axis=grown[0])
    graph.clean()


def _with(sizes: list, axis: int, size: int) -> list:
    return [*sizes[:axis], size, *sizes[axis + 1 :]]


def write_gathers(graph: OnnxGraph) -> None:
    """GatherND(x, i[..., None]) → Gather(x, i), and between two transposes Gather on their axis:
    as torch's exporter writes x[:, :, i].
    """
    producers, consumers = graph.producers(), graph.consumers()
    for node in [node for node in graph.nodes if node.op_type == "GatherND"]:
        index = producers.get(node.input[1])
        if attributes(node).get("batch_dims", 0) or index is None or not _adds_last(graph, index):
            continue
        source, result, axis = node.input[0], node.output[0], 0
        before, after = producers.get(source), consumers.get(result, [])
        if before is not None and len(after) == 1:
            moved = [_permutation(step) for step in (before, after[0])]
            if None not in moved and (place := _axis_between(*moved)) is not None:
                source, result, axis = before.input[0], after[0].output[0], place
        graph.rewrite(result, "Gather", [source, index.input[0]], axis=axis)
    graph.clean()


def pick_from_stacks(graph: OnnxGraph, sizes: Sizes) -> None:
    """Gather(Concat(Unsqueeze(a), Unsqueeze(b), …), 1) → b, along the axis that these have more."""
    producers = graph.producers()
    for node in [node for node in graph.nodes if node.op_type == "Gather"]:
        stack, index = producers.get(node.input[0]), node.input[1]
        if stack is None or stack.op_type != "Concat" or not graph.is_constant(index):
            continue
        parts = [producers.get(name) for name in stack.input]
        rank = len(sizes(parts[0].input[0]) or []) if parts[0] is not None else 0
        along = {attributes(step).get("axis", 0) for step in (stack, node)} <= {-1, rank}
        added = all(part is not None and _adds_last(graph, part, rank) for part in parts)
        if rank and along and added and not graph.shape(index):
            graph.replace(node.output[0], parts[int(graph.array(index))].input[0])
    graph.clean()


def _adds_last(graph: OnnxGraph, node: onnx.NodeProto, rank: int = -1) -> bool:
    """Whether a node gives a tensor, of that rank if it is known, one axis more, the last."""
    axes = node.input[1] if node.op_type == "Unsqueeze" else ""
    return bool(axes) and graph.is_constant(axes) and graph.array(axes).tolist() in ([-1], [rank])


def _permutation(node: onnx.NodeProto) -> list[int] | None:
    return attributes(node).get("perm") if node.op_type == "Transpose" else None


def _axis_between(first: list[int], last: list[int]) -> int | None:
    """The axis that one transpose brings to the front, if the other puts what was gathered there
    back in its place; None if anything else is moved.
    """
    axis, rest = first[0], len(first) - 1
    gathered = list(range(len(last) - rest))
    kept = list(range(len(gathered), len(last)))
    front = first[1:] == [place for place in range(len(first)) if place != axis]
    return axis if front and last == [*kept[:axis], *gathered, *kept[axis:]] else None


def split_gemms(graph: OnnxGraph) -> None:
    """Gemm(x, w, b), transposed and scaled in any way → Add(MatMul(x, w as [in, out]), b)."""
    for node in [node for node in graph.nodes if node.op_type == "Gemm"]:
        options = attributes(node)
        x, weight = node.input[:2]
        if options.get("transA"):
            x = graph.add("Transpose", [x], perm=[1, 0])
        if options.get("transB"):
            weight = _transposed(graph, weight)
        weight = _scaled(graph, weight, options.get("alpha", 1.0))
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and options.get("beta", 1.0) != 0:
            bias = _scaled(graph, bias, options.get("beta", 1.0))
            graph.rewrite(node.output[0], "Add", [graph.add("MatMul", [x, weight]), bias])
        else:
            graph.rewrite(node.output[0], "MatMul", [x, weight])
    graph.clean()


def _transposed(graph: OnnxGraph, name: str) -> str:
    if not graph.is_constant(name):
        return graph.add("Transpose", [name], perm=[1, 0])
    value = np.ascontiguousarray(graph.array(name).T)
    return graph.set_constant(f"{name}.transposed", value)


def _scaled(graph: OnnxGraph, name: str, factor: float) -> str:
    if factor == 1.0:
        return name
    if not graph.is_constant(name):
        return graph.add("Mul", [name, graph.number(factor)])
    value = graph.array(name) * np.float32(factor)
    return graph.set_constant(f"{name}.scaled{factor:g}", value)


def flatten_biases(graph: OnnxGraph) -> None:
    """Add(MatMul(x, w), b (1, 1, N)) → Add(MatMul(x, w), b (N))."""
    producers = graph.producers()
    for node in [node for node in graph.nodes if node.op_type == "Add"]:
        for place, name in enumerate(node.input):
            product = producers.get(node.input[1 - place])
            if product is None or product.op_type != "MatMul" or not graph.is_constant(name):
                continue
            shape, weight = graph.shape(name), product.input[1]
            width = graph.shape(weight)[-1:] if graph.is_constant(weight) else ()
            if len(shape) > 1 and shape[-1:] == width and math.prod(shape) == shape[-1]:
                flat = graph.array(name).reshape(-1)
                node.input[place] = graph.set_constant(graph.fresh("bias"), flat)
    graph.clean()


def transpose_weights(graph: OnnxGraph) -> None:
    """MatMul(x, Transpose(weight)) → MatMul(x, weight as [in, out])."""
    for node in list(graph.nodes):
        if node.op_type == "Transpose" and graph.is_constant(node.input[0]):
            name, array = node.input[0], graph.array(node.input[0])
            value = np.ascontiguousarray(np.transpose(array, attributes(node).get("perm")))
            graph.replace(node.output[0], graph.set_constant(f"{name}.transposed", value))
    graph.clean()


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
