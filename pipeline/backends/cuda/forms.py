"""Says in which forms activations lie on a GPU: row-major, all tokens in one type, bytes where a
layer in int8 reads them. What has one row a sequence (a pooler, a classifier) is float32.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bertile.graph import ops
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import shape
from bertile.lower.forms import FP32, Form, Forms
from bertile.schedules.task import Task

# What activations of a precision are stored as, where that is another one.
STORED = {"int8": "fp16", "tf32": "fp32"}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class GpuForms(Forms):
    """What every operator of a graph reads and writes on a GPU; FP32 is the form of one type."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        found = (self._of_tokens(binding.value) for binding in self.flow.bindings)
        self.tokens = next((one for one in found if one), "fp32")

    def input(self, call: relax.Call) -> Form:
        found = super().input(call)
        return found if found.kind.startswith("int8") else FP32

    def task(self, var: relax.Var) -> Task:
        call, task = self.flow.definition(var), super().task(var)
        if ops.is_call(call, "bertile.dense"):
            precision = str(task.shape.get("precision", "fp32"))
        elif ops.is_call(call, "bertile.attention"):
            precision = ops.precision(call)
        else:
            source = call.args[0] if ops.is_call(call, "bertile.first_token") else call
            precision = self.element(source)
        return Task(task.operation, {**task.shape, "precision": precision})

    def layout(self, operation: str, value: Any) -> Task:
        shape = super().layout(operation, value).shape
        return Task(operation, {**shape, "precision": self.element(value)})

    def narrow(self, value: Any, form: Form) -> Task:
        shape = super().narrow(value, form).shape
        return Task("narrow", {**shape, "precision": self.element(value)})

    def element(self, value: Any) -> str:
        """What a (B, S, C) or (N, C) tensor is stored as: "fp16", "bf16" or "fp32"."""
        return self.tokens if len(shape(value)) == 3 else "fp32"

    def _of_tokens(self, value: Any) -> str | None:
        """What an operator says of how tokens are stored."""
        names = ("dense", "attention", "embedding")
        if not any(ops.is_call(value, f"bertile.{name}") for name in names):
            return None
        precision = ops.precision(value)
        return STORED.get(precision, precision) if len(shape(value)) == 3 else None
