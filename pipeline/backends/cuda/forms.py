"""Says in which forms activations lie on a GPU: row-major, all tokens in one type, bytes where a
layer in int8 reads them. What has one row a sequence (a pooler, a classifier) and the angles of
places are float32.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import shape
from bertile.lower import operators
from bertile.lower.form import FP32, Form
from bertile.lower.forms import Forms
from bertile.schedules.task import Task

# What activations of a precision are stored as, where that is another one.
STORED = {"int8": "fp16", "tf32": "fp32"}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class GpuForms(Forms):
    """What every operator of a graph reads and writes on a GPU; FP32 is the form of one type."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        stored = (self._of_tokens(binding.value) for binding in self.flow.bindings)
        self.tokens = next((kind for kind in stored if kind), "fp32")
        ours = (binding.value for binding in self.flow.bindings if ops.is_ours(binding.value))
        self.angles = {angle for call in ours for angle in ops.angles(call)}

    def input(self, call: relax.Call) -> Form:
        form = super().input(call)
        return form if form.in_bytes else FP32

    def task(self, var: relax.Var) -> Task:
        call, task = self.flow.definition(var), super().task(var)
        operator = operators.of(call)
        if operator.precision == operators.PRODUCTS:
            precision = str(task.shape.get("precision", ops.precision(call)))
        else:
            precision = self.element(call.args[0] if operator.leaves else call)
        return Task(task.operation, {**task.shape, "precision": precision})

    def layout(self, operation: str, value: Any) -> Task:
        shape = super().layout(operation, value).shape
        return Task(operation, {**shape, "precision": self.element(value)})

    def narrow(self, value: Any, form: Form) -> Task:
        shape = super().narrow(value, form).shape
        return Task("narrow", {**shape, "precision": self.element(value)})

    def element(self, value: Any) -> str:
        """What a (B, S, C) or (N, C) tensor is stored as: "fp16", "bf16" or "fp32"."""
        return self.tokens if len(shape(value)) == 3 and value not in self.angles else "fp32"

    def _of_tokens(self, value: Any) -> str | None:
        """What an operator says of how tokens are stored."""
        operator = operators.of(value)
        if operator is None or not operator.precision or len(shape(value)) < 3:
            return None
        precision = ops.precision(value)
        return STORED.get(precision, precision)
