"""A float ONNX encoder, as torch's TorchScript exporter writes it, in the forms that SparseML gives
a model after quantization-aware training. Its files are described in its exporters' transforms.

"QDQ"            every linear layer: Q, DQ of its input; weight (outputs, inputs) → Q → DQ →
                 Transpose. Both operands and the result of attention's products: Q, DQ.
"QDQ, integers"  the same with weights (inputs, outputs) of int8 → DQ
"integer"        for DeepSparse: MatMulInteger, Add of a bias in int32, Cast, Mul; QLinearMatMul;
                 weights and tables moved to uint8, where 128 stands for zero

Weights and tables are symmetric, one scale for a tensor: max|w| / 127.5, so that -128 occurs.
Activations are uint8 between their smallest and largest value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bertile.onnx.samples import session

FORMS = ("QDQ", "QDQ, integers", "integer")


def write(source: Path, target: Path, form: str, batches: list[dict[str, np.ndarray]]) -> Path:
    """Quantize `source` with the ranges that `batches` give, and write it to `target`."""
    model = onnx.load(source)
    onnx.save(_Quantizing(model, form, _ranges(model, batches)).model(), target)
    return target


def _ranges(
    model: onnx.ModelProto, batches: list[dict[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of what products read and compute; zero is in between."""
    names = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    names |= {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    names -= {tensor.name for tensor in model.graph.initializer}
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    known = {output.name for output in seen.graph.output}
    seen.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names - known)
    runner = session(seen.SerializeToString())
    results = [dict(zip(names, runner.run(list(names), batch))) for batch in batches]
    return {
        name: (
            min(0.0, *(arrays[name].min() for arrays in results)),
            max(arrays[name].max() for arrays in results),
        )
        for name in names
    }


class _Quantizing:
    def __init__(
        self, model: onnx.ModelProto, form: str, ranges: dict[str, tuple[float, float]]
    ) -> None:
        self.source, self.integer, self.floats = model, form == "integer", form == "QDQ"
        self.ranges = ranges
        self.arrays = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self.nodes: list[onnx.NodeProto] = []

    def model(self) -> onnx.ModelProto:
        nodes = list(self.source.graph.node)
        adds = {name: node for node in nodes if node.op_type == "Add" for name in node.input}
        taken: set[str] = set()  # the results of additions of a bias that products in integers hold
        for node in nodes:
            if node.op_type == "MatMul" and node.input[1] in self.arrays:
                add = adds[node.output[0]]
                taken |= {add.output[0]} if self.integer else set()
                self._linear(node, add)
            elif node.op_type == "MatMul":
                self._product(node)
            elif node.op_type == "Gather" and np.ndim(self.arrays.get(node.input[0])) == 2:
                self._lookup(node)
            elif not taken.intersection(node.output):
                self.nodes.append(node)
        graph = self.source.graph
        tensors = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        quantized = helper.make_graph(self.nodes, graph.name, graph.input, graph.output, tensors)
        imports = list(self.source.opset_import)
        return helper.make_model(quantized, opset_imports=imports, ir_version=10)

    def _linear(self, node: onnx.NodeProto, add: onnx.NodeProto) -> None:
        (x, weight), output = node.input, node.output[0]
        w = self.arrays.pop(weight)
        if not self.integer:
            node.input[0], node.input[1] = self._pair(x, output), self._weight(output, w)
            self.nodes.append(node)
            return
        name, scale, zero = self._integers(f"{output}.weight", w)
        x_scale, x_zero = self._step(x)
        self._node("QuantizeLinear", [x, x_scale, x_zero], f"{output}.x")
        self._node("MatMulInteger", [f"{output}.x", name, x_zero, zero], f"{output}_quant")
        both = self.arrays[x_scale] * self.arrays[scale]
        bias = next(self.arrays[term] for term in add.input if term in self.arrays)
        bias = self._constant(f"{output}.bias", np.rint(bias / both).astype("int32"))
        self._node("Add", [f"{output}_quant", bias], f"{output}_bias")
        self._node("Cast", [f"{output}_bias"], f"{output}_cast", to=TensorProto.FLOAT)
        rescale = self._constant(f"{output}.rescale", both)
        self._node("Mul", [f"{output}_cast", rescale], add.output[0])

    def _product(self, node: onnx.NodeProto) -> None:
        output = node.output[0]
        if not self.integer:
            read = [
                self._pair(operand, f"{output}.{place}") for place, operand in enumerate(node.input)
            ]
            self._node("MatMul", read, f"{output}.floats")
            self._node("Identity", [self._pair(f"{output}.floats", output, output)], output)
            return
        steps = []
        for place, operand in enumerate(node.input):
            step = self._step(operand)
            self._node("QuantizeLinear", [operand, *step], f"{output}.{place}")
            steps += [f"{output}.{place}", *step]
        self._node("QLinearMatMul", [*steps, *self._step(output)], f"{output}_quant")
        self._node("DequantizeLinear", [f"{output}_quant", *self._step(output)], output)

    def _lookup(self, node: onnx.NodeProto) -> None:
        table, output = self.arrays.pop(node.input[0]), node.output[0]
        if not self.integer:
            node.input[0] = self._weight(output, table, transposed=False)
            self.nodes.append(node)
            return
        node.input[0], scale, zero = self._integers(f"{output}.table", table)
        node.output[0] = f"{output}_quant"
        self.nodes.append(node)
        self._node("DequantizeLinear", [f"{output}_quant", scale, zero], output)

    def _weight(self, prefix: str, w: np.ndarray, transposed: bool = True) -> str:
        """The floats that integers stand for."""
        if not self.floats:
            integers = self._integers(f"{prefix}.weight", w)
            return self._node("DequantizeLinear", integers, f"{prefix}.w")
        _, scale, zero = self._integers(f"{prefix}.integers", w)
        del self.arrays[f"{prefix}.integers"]
        name = self._constant(f"{prefix}.weight", np.ascontiguousarray(w.T) if transposed else w)
        self._node("QuantizeLinear", [name, scale, zero], f"{prefix}.q")
        floats = self._node("DequantizeLinear", [f"{prefix}.q", scale, zero], f"{prefix}.w")
        return (
            self._node("Transpose", [floats], f"{prefix}.t", perm=[1, 0]) if transposed else floats
        )

    def _integers(self, name: str, w: np.ndarray) -> tuple[str, str, str]:
        scale = np.float32(np.abs(w).max() / 127.5)
        integers = np.clip(np.rint(w / scale), -128, 127)
        moved, dtype = (128, "uint8") if self.integer else (0, "int8")
        return (
            self._constant(name, (integers + moved).astype(dtype)),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero", np.asarray(moved, dtype)),
        )

    def _pair(self, x: str, prefix: str, ranged: str = "") -> str:
        """An activation, quantized and dequantized, with the range of `ranged`, or its own."""
        step = self._step(ranged or x)
        self._node("QuantizeLinear", [x, *step], f"{prefix}.x.q")
        return self._node("DequantizeLinear", [f"{prefix}.x.q", *step], f"{prefix}.x.dq")

    def _step(self, name: str) -> tuple[str, str]:
        low, high = self.ranges[name]
        scale = np.float32((high - low) / 255)
        zero = np.asarray(np.rint(-low / scale), "uint8")
        return self._constant(f"{name}.scale", scale), self._constant(f"{name}.zero", zero)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.arrays[name] = np.asarray(value)
        return name

    def _node(self, op: str, inputs: tuple | list, output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output
