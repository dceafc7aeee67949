"""Calls kernels of a GPU, on row-major activations.

    bertile.dense(x (B, S, K), w, b)  →  call_dps_packed("dense_…", x (16 m, K), w packed, b)

A kernel is text here, which Relax sees as a function from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax

from bertile.backends.cuda.forms import DTYPES, GpuForms
from bertile.base.errors import ModelError
from bertile.graph import ops
from bertile.graph.rewriting.dataflow import shape
from bertile.lower.dense_weights import Arrays
from bertile.lower.form import FP32, Form
from bertile.lower.lowering import Lowered, Lowering
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cuda.forms import pitch
from bertile.schedules.task import Task

PREFIX = "prefix"  # what Relax sees as a function, and a plan as the same place


def lower(graph: Any, row: Any, choose: Any) -> Lowered:
    """Replace every fused operator by its kernel; the result's ``kernels`` are those, by name."""
    return _GpuLowering(graph, GpuForms(graph), row, choose).run()


class _GpuLowering(Lowering):
    def types(self, old: Any, form: Form) -> list[relax.TensorType]:
        *outer, channels = shape(old)
        rows = self._rows() if len(outer) == 2 else outer[0]
        dtype = DTYPES[self.forms.element(old)] if form == FP32 else "uint8"
        types = [relax.TensorType([rows, pitch(channels)], dtype)]
        if form.ranges:  # scale and low of each token
            types.append(relax.TensorType([rows, 2], "float32"))
        return types

    def _rows(self) -> Any:
        return self.table.ty.shape[0] * BLOCK_TOKENS

    def _in_form(self, old: Any, form: Form) -> list[Any]:
        if form == FP32 and (old, form) not in self.lanes and _as_it_is(old):
            self.lanes[old, form] = [self._row_major(old)]
        return super()._in_form(old, form)

    def _out_of_lanes(self, old: relax.Var) -> Any:
        if _as_it_is(old):
            (self.rows[old],) = self.lanes[old, FP32]
            return self.rows[old]
        return super()._out_of_lanes(old)

    def _keys(self, mask: Any) -> Any:
        out = relax.TensorType([self._rows()], "float32")
        return self._once(
            ("key_mask", mask),
            lambda: self._single(Task("key_mask"), [self._row_major(mask), self.table], out),
        )

    def _biases(self, bias: Any) -> Any:
        return self._row_major(bias)

    def _generic(self, var: relax.Var, value: Any) -> None:
        if ops.is_call(value, "relax.cumsum"):
            self.rows[var] = self._running_sum(value)
        elif _is_prefix(value):
            call = relax.call_dps_packed(PREFIX, [value.args[0]], var.ty)
            self.rows[var] = self.builder.emit(call)
        else:
            super()._generic(var, value)

    def _running_sum(self, call: relax.Call) -> Any:
        """TVM has running sums on a GPU only with CUDA's own library for them."""
        x, axis = call.args[0], call.attrs.axis
        dtype, last = str(call.ty.dtype), len(shape(x)) - 1
        along_rows = axis is not None and last == 1 and int(axis) in (last, -1)
        if not along_rows or call.attrs.exclusive or str(x.ty.dtype) != dtype or dtype != "int64":
            raise ModelError(
                "cumsum runs on a GPU along the rows of a matrix of int64, which this is not",
                "compile the model for a CPU",
            )
        return self._single(Task("cumsum"), [self._row_major(x)], call.ty)

    def _call(self, task: Task, activations: Sequence[Any], weights: Arrays, out: Any) -> Any:
        knobs = self.choose(task)
        if task not in self.kernels:
            self.kernels[task] = self.schedules[task.operation].kernel(task, knobs, self.row)
        self.tasks[task] += 1
        args = [*activations, *self.weights.packed(task, knobs, weights)]
        return self.builder.emit(relax.call_dps_packed(task.name, args, out))


def _is_prefix(value: Any) -> bool:
    """Whether a value is the start of a constant row: its memory is that of the whole row."""
    if not ops.is_call(value, "relax.strided_slice"):
        return False
    x, axes, begin, _, *strides = value.args
    numbers = [[int(n) for n in each.fields] for each in (axes, begin, *strides)]
    row = isinstance(x, tvm.ir.GenericConst) and len(shape(x)) == 2 and shape(x)[0] == 1
    return row and numbers in ([[1], [0], [1]], [[1], [0]])


def _as_it_is(old: Any) -> bool:
    """Whether a tensor is the same row-major and as an activation."""
    extents = shape(old)
    return len(extents) == 2 and extents[-1] % BLOCK_TOKENS == 0
