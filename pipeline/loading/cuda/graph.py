"""Makes one CUDA graph of all launches of a shape, with the copies around them or without."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import numpy as np

from bertile.loading.cuda.code import Code
from bertile.loading.cuda.driver import ADDRESS, POINTER, UNSIGNED, KernelNode, MemcpyNode
from bertile.loading.cuda.gpu import Gpu
from bertile.loading.cuda.layout import Array, Layout, Step
from bertile.loading.errors import AGAIN, BundleError

_GRID = (2**31 - 1, 65535, 65535)


class Graph:
    """All launches of one shape as one executable graph; with copies, or with what may be moved.

    `up` and `down` are the inputs and outputs in the staging memory, [inputs | outputs].
    """

    def __init__(
        self,
        gpu: Gpu,
        code: Code,
        layout: Layout,
        base: int,
        inputs: list[int],
        staging: np.ndarray | None,
        constants: int | None,
        copies: bool,
    ):
        self._gpu, self.layout, self._constants = gpu, layout, constants
        self._pointers = {"weight": code.weights, "input": inputs}
        self._pointers["buffer"] = {buffer: base + at for buffer, at in layout.buffers.items()}
        self._movable: list[tuple] = []
        self._at: list = [*inputs[:-1], *(base + array.offset for array in layout.outputs)]
        self._own = tuple(self._at)
        self.up, self.down = [], []
        if staging is not None:
            split = layout.input_bytes
            self.up = [view(staging, array, layout.output_bytes) for array in layout.inputs]
            self.down = [view(staging[split:], array) for array in layout.outputs]
        self.executable = None
        self._graph = gpu.handle("cuGraphCreate", 0)
        try:
            self._add_nodes(code, base, staging.ctypes.data if copies else None)
            self.executable = gpu.handle("cuGraphInstantiateWithFlags", self._graph, 0)
            if staging is not None:  # its nodes stay as they are
                self._movable.clear()
                gpu.call("cuGraphDestroy", self._graph)
                self._graph = None
        except BaseException:
            self._constants = None  # whoever gave them keeps them
            self.close()
            raise

    def _add_nodes(self, code: Code, base: int, staging: int | None) -> None:
        layout, nodes = self.layout, []
        first = last = []
        if staging is not None:
            begin = base + layout.output_bytes
            first = [self._copy([], staging, 1, begin, 2, layout.input_bytes)]
        for step, waits in zip(layout.steps, layout.after):
            nodes.append(self._kernel(code, step, [nodes[number] for number in waits] or first))
        if staging is not None:
            waited = {number for waits in layout.after for number in waits}
            last = [node for number, node in enumerate(nodes) if number not in waited]
            down = staging + layout.input_bytes
            self._copy(last, base, 2, down, 1, layout.output_bytes)

    def _kernel(self, code: Code, step: Step, waits: list[int]) -> int:
        values = self.layout.values
        cells = (ADDRESS * len(step.arguments))(
            *(self._cell(kind, value) for kind, value in step.arguments)
        )
        at = ctypes.addressof(cells)
        places = (POINTER * len(cells))(*range(at, at + 8 * len(cells), 8))
        grid = [values[extent] for extent in step.grid]
        if not all(0 < size <= limit for size, limit in zip(grid, _GRID)):
            raise BundleError(f"the plan launches {step.entry} on a grid of {grid}", AGAIN)
        params = KernelNode(
            code.functions[step.entry],
            (UNSIGNED * 3)(*grid),
            (UNSIGNED * 3)(step.threads, 1, 1),
            step.shared,
            ctypes.addressof(places),
        )
        node = self._add("cuGraphAddKernelNode", waits, ctypes.byref(params))
        outputs, count = self.layout.output_buffers, len(self.layout.inputs) - 1
        moved = [
            (cell, count + outputs[value] if kind == "buffer" else value)
            for cell, (kind, value) in enumerate(step.arguments)
            if (kind == "input" and value < count) or (kind == "buffer" and value in outputs)
        ]
        if moved:
            self._movable.append((node, params, cells, places, moved))
        return node

    def _cell(self, kind: str, value: int | float) -> int:
        """An argument as the 8 bytes, lowest first, that its parameter is read from."""
        if kind == "float32":
            return int.from_bytes(struct.pack("<f", value), "little")
        if kind in self._pointers:
            return self._pointers[kind][value]
        number, bits = self.layout.values[value], int(kind[3:])
        if not -(1 << bits - 1) <= number < 1 << bits - 1:
            raise BundleError(f"the plan gives {number} as {kind}", "take a smaller batch")
        return number & (1 << bits) - 1

    def _copy(
        self, waits: list[int], source: int, kind: int, target: int, other: int, size: int
    ) -> int:
        params = MemcpyNode(bytes=size, height=1, depth=1, source_kind=kind, target_kind=other)
        setattr(params, "source_host" if kind == 1 else "source_device", source)
        setattr(params, "target_host" if other == 1 else "target_device", target)
        return self._add("cuGraphAddMemcpyNode", waits, ctypes.byref(params), self._gpu.context)

    def _add(self, name: str, waits: list[int], *rest) -> int:
        before = (POINTER * len(waits))(*waits)
        return self._gpu.handle(name, self._graph, before, len(waits), *rest)

    def point(self, inputs: Sequence[int | None], outputs: Sequence[int]) -> None:
        """Let the kernels read and write elsewhere; None is what the graph has of its own."""
        wanted = [own if new is None else new for own, new in zip(self._own, (*inputs, *outputs))]
        if wanted == self._at:
            return
        before, self._at = self._at, [None] * len(wanted)  # unknown, should one of them fail
        for node, params, cells, _, moved in self._movable:
            for cell, number in moved:
                cells[cell] = wanted[number]
            if any(wanted[number] != before[number] for _, number in moved):
                self._gpu.call(
                    "cuGraphExecKernelNodeSetParams", self.executable, node, ctypes.byref(params)
                )
        self._at = wanted

    def close(self) -> None:
        if self.executable is not None:
            self._gpu.drop("cuGraphExecDestroy", self.executable)
        if self._graph is not None:
            self._gpu.drop("cuGraphDestroy", self._graph)
        if self._constants is not None:
            self._gpu.drop("cuMemFree_v2", self._constants)
        self.executable = self._graph = self._constants = None


def view(memory: np.ndarray, array: Array, shift: int = 0) -> np.ndarray:
    """Return an array of a layout in memory that begins at the place `shift` of its arena."""
    begin = array.offset - shift
    return memory[begin : begin + array.bytes].view(array.dtype).reshape(array.shape)
