"""Takes the branch of each If whose condition is the same for every request.

    If(length of queries != length of keys) {…} else {…}  →  the nodes of the branch that is taken

torch.jit.script writes such of code that a trace would have settled. A condition is judged by its
value over several requests; one that an input's values decide is left, and refused by its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from bertile.onnx.dependence import dependence
from bertile.onnx.graph import OnnxGraph, attributes
from bertile.onnx.probing import SHAPES, evaluated

# Long requests too: a branch may be for those beyond a limit.
SIZES = (*SHAPES, (1, 512), (1, 2048), (1, 8192))


def settle(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without the branches that no request takes."""
    while True:
        graph = OnnxGraph(model)
        kinds = dependence(graph)
        nodes = [node for node in graph.nodes if node.op_type == "If"]
        names = [node.input[0] for node in nodes]
        names = [n for n in names if kinds.get(n, "constant") in ("constant", "shape")]
        # behind another If a condition waits until that is settled
        names = [n for n in names if all(node.op_type != "If" for node in graph.cut(n).nodes)]
        conditions = _conditions(graph, model, names)
        if not conditions:
            return model
        model = _taken(model, conditions)


def _conditions(graph: OnnxGraph, model: onnx.ModelProto, names: list[str]) -> dict[str, bool]:
    """What each of these tensors is in every request; those that vary are left out."""
    if not names:
        return {}
    known = {name: bool(graph.array(name)) for name in names if graph.is_constant(name)}
    computed = [name for name in dict.fromkeys(names) if name not in known]
    if not computed:
        return known
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    inputs = graph.cut(*computed).inputs
    feeds = [_ones(inputs, *shape) for shape in SIZES]
    for name in computed:
        runs = [evaluated(graph, name, feed, opset) for feed in feeds]
        values = {bool(run) for run in runs if run is not None}  # None: longer than it takes
        if len(values) == 1:
            known[name] = values.pop()
    return known


def _ones(inputs: list[Any], batch: int, length: int) -> dict[str, np.ndarray]:
    """A request in which every number is 1; static axes keep their size."""
    feed = {}
    for value in inputs:
        kind = value.type.tensor_type
        sizes = [batch, length]
        shape = [
            dim.dim_value or (sizes[axis] if axis < 2 else 1)
            for axis, dim in enumerate(kind.shape.dim)
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feed[value.name] = np.ones(shape, dtype)
    return feed


def _taken(model: onnx.ModelProto, conditions: dict[str, bool]) -> onnx.ModelProto:
    """The model with the nodes of one branch in the place of each If of these conditions."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = list(result.graph.node)
    del result.graph.node[:]
    for node in nodes:
        if node.op_type != "If" or node.input[0] not in conditions:
            result.graph.node.append(node)
            continue
        branch = attributes(node)["then_branch" if conditions[node.input[0]] else "else_branch"]
        result.graph.node.extend(branch.node)
        result.graph.initializer.extend(branch.initializer)
        for inner, outer in zip(branch.output, node.output):
            result.graph.node.append(onnx.helper.make_node("Identity", [inner.name], [outer]))
    return result
