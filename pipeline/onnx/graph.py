"""Edits an ONNX graph: constants as arrays, uses followed, dead nodes dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# A tensor's axes by its name: an int, or anything that is equal only to itself; None if unknown.
Sizes = Callable[[str], list | None]
EXTERNAL_DATA_BYTES = 1_500_000_000
IR_VERSION = 10  # the newest that came with opset 20 or 21, so that older runtimes read it too


class OnnxGraph:
    """Wraps a ModelProto; edits change `nodes` and `constants`, `to_model` writes them back.

    Nodes may be added in any order: they are sorted, and what nothing reads is dropped, by
    `clean`. Names of graph inputs and outputs never change.
    """

    def __init__(self, model: onnx.ModelProto):
        # Copies, except of the weights: the model itself stays as it is.
        graph = onnx.GraphProto()
        graph.node.extend(model.graph.node)
        graph.input.extend(model.graph.input)
        graph.output.extend(model.graph.output)
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, np.ndarray] = {}
        weights = set(self._tensors)
        weights |= {sparse.values.name for sparse in model.graph.sparse_initializer}
        self.inputs = [value for value in graph.input if value.name not in weights]
        self.results = list(graph.output)
        self.outputs = [result.name for result in self.results]
        self._named = 0
        # A file that Bertile wrote, quantized by somebody since, has names of ours already.
        self._taken = {name for node in self.nodes for name in node.output} | weights
        for sparse in model.graph.sparse_initializer:
            self.set_constant(sparse.values.name, dense_array(sparse))
        self._fold_constant_nodes()

    def is_constant(self, name: str) -> bool:
        return name in self._tensors or name in self._arrays

    def array(self, name: str) -> np.ndarray:
        """Return the value of a constant."""
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a constant without reading its value."""
        if name in self._arrays:
            return self._arrays[name].shape
        return tuple(self._tensors[name].dims)

    def constants(self) -> list[str]:
        """Return the names of all constants."""
        return list({**self._tensors, **self._arrays})

    def dtype(self, name: str) -> str:
        """Return the element type of a constant as numpy names it, without reading its value."""
        if name in self._arrays:
            return str(self._arrays[name].dtype)
        return str(helper.tensor_dtype_to_np_dtype(self._tensors[name].data_type))

    def is_float(self, name: str) -> bool:
        """Say whether a constant holds floating-point values, without reading them."""
        if name in self._arrays:
            return self._arrays[name].dtype.kind == "f"
        return self._tensors[name].data_type in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.DOUBLE,
            onnx.TensorProto.BFLOAT16,
        )

    def scalar(self, name: str) -> float | None:
        """Return the value of a constant that has a single element, else None."""
        if not self.is_constant(name) or int(np.prod(self.shape(name))) != 1:
            return None
        return float(self.array(name).reshape(()))

    def constant(self, value: Any, hint: str = "constant") -> str:
        """Add an array and return its name; small equal ones share a name."""
        array = np.asarray(value)
        if array.size <= 64:
            for name, other in self._arrays.items():
                same = other.dtype == array.dtype and other.shape == array.shape
                if same and np.array_equal(other, array):
                    return name
        return self.set_constant(self.fresh(hint), array)

    def number(self, value: float) -> str:
        """Add a float32 number and return its name."""
        return self.constant(np.asarray(value, np.float32))

    def integers(self, *values: int) -> str:
        """Add an int64 vector and return its name."""
        return self.constant(np.asarray(values, np.int64))

    def set_constant(self, name: str, value: np.ndarray) -> str:
        self._tensors.pop(name, None)
        self._arrays[name] = np.asarray(value)
        return name

    def rename_constant(self, old: str, new: str) -> None:
        self._arrays[new] = self.array(old)
        self.replace(old, new)

    def rename_tensor(self, old: str, new: str) -> None:
        """Call a computed tensor or an input otherwise, wherever it stands in a node."""
        for node in self.nodes:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        self._taken.add(new)

    def fresh(self, hint: str) -> str:
        name = ""
        while not name or name in self._taken:
            self._named += 1
            name = f"bertile.{hint}.{self._named}"
        return name

    def add(self, op: str, inputs: Iterable[str], **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        output = self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                consumers.setdefault(name, []).append(node)
        return consumers

    def replace(self, old: str, new: str) -> None:
        """Make every reader of `old` read `new`; a graph output keeps its name."""
        if old in self.outputs:
            for node in self.nodes:
                if old in node.output:
                    node.output[:] = [self.fresh("unused") if o == old else o for o in node.output]
            self.nodes.append(helper.make_node("Identity", [new], [old], name=old))
        for node in self.nodes:
            if old in node.input and old not in node.output:
                node.input[:] = [new if name == old else name for name in node.input]

    def rewrite(self, output: str, op: str, inputs: Iterable[str], **attributes: Any) -> str:
        """Make another node compute the tensor `output`, which keeps its name."""
        node = next(node for node in self.nodes if output in node.output)
        node.output[:] = [self.fresh("unused") if o == output else o for o in node.output]
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def clean(self) -> None:
        """Drop identities and dead nodes, and sort the rest into the order of their data."""
        self._drop_identities()
        producers = self.producers()
        order: list[onnx.NodeProto] = []
        done: set[int] = set()
        for output in self.outputs:
            stack = [producers[output]] if output in producers else []
            while stack:
                node = stack[-1]
                before = (producers[name] for name in node.input if name in producers)
                waiting = [producer for producer in before if id(producer) not in done]
                stack.extend(waiting)
                if not waiting:
                    stack.pop()
                    if id(node) not in done:
                        done.add(id(node))
                        order.append(node)
        self.nodes = order
        used = {name for node in order for name in node.input} | set(self.outputs)
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}
        self._arrays = {name: array for name, array in self._arrays.items() if name in used}

    def cut(self, *names: str) -> OnnxGraph:
        """Return a copy that computes these tensors alone, from the inputs that they need."""
        part = copy.copy(self)
        part.nodes = [copy.deepcopy(node) for node in self.nodes]
        part.results = [onnx.ValueInfoProto(name=name) for name in names]
        part.outputs = list(names)
        part.clean()
        read = {operand for node in part.nodes for operand in node.input}
        part.inputs = [value for value in part.inputs if value.name in read]
        return part

    def to_model(self, opset: int, outputs: Iterable[str] = ()) -> onnx.ModelProto:
        """Return a model of the graph as it is now, with `outputs` shown beside its own."""
        tensors = dict(self._tensors)
        for name, array in self._arrays.items():
            if name not in tensors:
                tensors[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        shown = [onnx.ValueInfoProto(name=name) for name in outputs if name not in self.outputs]
        # Filled in place: the functions that make graphs and models copy all weights each time.
        model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="bertile")
        for domain in sorted({node.domain for node in self.nodes} - {"", "ai.onnx"}):
            model.opset_import.append(helper.make_opsetid(domain, 1))
        model.opset_import.append(helper.make_opsetid("", opset))
        model.graph.name = "bertile"
        model.graph.node.extend(self.nodes)
        model.graph.input.extend(self.inputs)
        model.graph.output.extend([*self.results, *shown])
        model.graph.initializer.extend(tensors.values())
        return model

    def _fold_constant_nodes(self) -> None:
        kept = []
        for node in self.nodes:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self.set_constant(node.output[0], _constant_value(node.attribute[0]))
            else:
                kept.append(node)
        self.nodes = kept

    def _drop_identities(self) -> None:
        renamed: dict[str, str] = {}
        producers = self.producers()
        kept = []
        for node in self.nodes:
            source = node.input[0] if node.op_type == "Identity" else ""
            if node.op_type != "Identity":
                kept.append(node)
            elif node.output[0] not in self.outputs:
                renamed[node.output[0]] = source
            elif source in producers and source not in self.outputs:
                # The node before it takes the output's name, and other readers follow.
                before = producers[source]
                before.output[:] = [node.output[0] if o == source else o for o in before.output]
                renamed[source] = node.output[0]
                producers[node.output[0]] = before
            else:
                kept.append(node)
        for node in kept:
            node.input[:] = [_end(renamed, name) for name in node.input]
        self.nodes = kept


def dense_array(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """Return a sparse tensor as an array; its indices count elements, or are coordinates."""
    values, indices = map(numpy_helper.to_array, (sparse.values, sparse.indices))
    array = np.zeros(tuple(sparse.dims), values.dtype)
    places = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, array.shape)
    array[places] = values
    return array


def _constant_value(attribute: onnx.AttributeProto) -> np.ndarray:
    """The value of a node Constant, in whichever of its attributes it is."""
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SparseTensorProto):
        return dense_array(value)
    if attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
        return np.asarray(value, np.float32)
    if attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
        return np.asarray(value, np.int64)
    return np.asarray(value)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the size of all weights; protobuf's own answer takes as long as writing them."""
    return sum(
        int(np.prod(tensor.dims, dtype=np.int64))
        * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file, or with its weights beside it where protobuf's 2 GiB are near."""
    external = weight_bytes(model) > EXTERNAL_DATA_BYTES
    location = f"{path.name}.data" if external else None
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, path, save_as_external_data=external, location=location)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes as plain Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _end(renamed: dict[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name
