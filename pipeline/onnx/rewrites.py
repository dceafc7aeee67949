"""Brings products, reshapes and reductions of an ONNX graph to one spelling.

Every public function changes the graph in place and is harmless where nothing matches.
"""

from __future__ import annotations

import numpy as np
import onnx

from bertile.onnx.graph import OnnxGraph, Sizes, attributes


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


def split_gemms(graph: OnnxGraph) -> None:
    """Gemm(x, w, b) with its weight in either layout → Add(MatMul(x, w as [in, out]), b)."""
    for node in list(graph.nodes):
        options = attributes(node)
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get(
            "transA"
        )
        if node.op_type != "Gemm" or not plain or not graph.is_constant(node.input[1]):
            continue
        weight = node.input[1]
        if options.get("transB"):
            transposed = np.ascontiguousarray(graph.array(weight).T)
            weight = graph.set_constant(f"{weight}.transposed", transposed)
        product = graph.add("MatMul", [node.input[0], weight])
        if len(node.input) > 2 and node.input[2]:
            product = graph.add("Add", [product, node.input[2]])
        graph.replace(node.output[0], product)
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
