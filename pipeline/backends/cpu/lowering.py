"""Calls kernels of a processor, on activations in lanes.

bertile.dense(x (B, S, K), w, b)  →  call_tir(dense_K_N, [x (m, K, 16), w packed, b packed])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from bertile.codegen.job_queue import with_queue
from bertile.graph.graph import Graph
from bertile.graph.rewriting.dataflow import shape
from bertile.lower.dense_weights import Arrays
from bertile.lower.form import FP32, Form
from bertile.lower.forms import Forms
from bertile.lower.lowering import Choice, Lowered, Lowering
from bertile.lower.stages import Stage
from bertile.schedules import BLOCK_TOKENS
from bertile.schedules.cpu.generic import KERNEL
from bertile.schedules.task import Task
from bertile.targets.rows import Target


def lower(graph: Graph, row: Target, choose: Choice, stages: Sequence[Stage] = ()) -> Lowered:
    """Replace every fused operator by its kernel, with the knobs that ``choose`` gives for its
    task; the same of the stages that the graph was cut into.
    """
    return _CpuLowering(graph, Forms(graph), row, choose).run(stages)


class _CpuLowering(Lowering):
    def types(self, old: Any, form: Form) -> list[relax.TensorType]:
        """The types in lanes of a (B, S, C) or (N, C) tensor in a form."""
        *outer, channels = shape(old)
        rows = (outer[0] + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS
        blocks = self.table.ty.shape[0] if len(outer) == 2 else rows
        wide = -(-channels // form.group)
        dtype = "float32" if form == FP32 else "int32"
        types = [relax.TensorType([blocks, wide, BLOCK_TOKENS], dtype)]
        if form.ranges:  # scale and low of each token
            types.append(relax.TensorType([blocks, 2, BLOCK_TOKENS], "float32"))
        return types

    def _keys(self, mask: Any) -> Any:
        out = relax.TensorType([self.table.ty.shape[0], BLOCK_TOKENS], "float32")
        return self._once(
            ("key_mask", mask),
            lambda: self._single(Task("key_mask"), [self._row_major(mask), self.table], out),
        )

    def _biases(self, bias: Any) -> Any:
        rows, heads, length, _ = bias.ty.shape
        tiles = (length + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS
        extents = [rows, heads, tiles, tiles * BLOCK_TOKENS, BLOCK_TOKENS]
        out = relax.TensorType(extents, "float32")
        return self._once(
            ("query_bias", bias),
            lambda: self._single(Task("query_bias"), [self._row_major(bias)], out),
        )

    def _call(self, task: Task, activations: Sequence[Any], weights: Arrays, out: Any) -> Any:
        knobs = self.choose(task)
        if task not in self.kernels:
            func = with_queue(self.schedules[task.operation].kernel(task, knobs, self.row))
            self.kernels[task] = self.builder.add_func(func.with_attrs(KERNEL), task.name)
        self.tasks[task] += 1
        args = [*activations, *self.weights.packed(task, knobs, weights)]
        return self.builder.emit(relax.call_tir(self.kernels[task], args, out_ty=out))
