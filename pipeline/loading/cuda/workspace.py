"""Lends one request at a time what it runs in: a stream, memory for activations, and graphs."""

from __future__ import annotations

import ctypes
from collections import OrderedDict

import numpy as np

from bertile.loading.blocks import BLOCK_TOKENS, blocks_of
from bertile.loading.cuda.code import Code
from bertile.loading.cuda.gpu import NO_TIMING, OWN_STREAM, Gpu, host_memory
from bertile.loading.cuda.graph import Graph, view
from bertile.loading.cuda.layout import Layout
from bertile.loading.cuda.plan import GRAPHS, Plan
from bertile.loading.inputs import filled


class Workspace:
    """What one request at a time runs in: a stream, an arena, pinned staging memory and graphs."""

    def __init__(self, gpu: Gpu, plan: Plan, code: Code, manifest: dict):
        self._gpu, self._plan, self._code = gpu, plan, code
        self._defaults = [spec["default"] for spec in manifest["inputs"]]
        self._names = [spec["name"] for spec in manifest["inputs"]]
        self._arena = self._arena_bytes = self._staging = 0
        self._memory = _NOTHING  # the staging memory
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self.last: int | None = None  # the stream of the last launch
        self._pending = False  # whether that may still run
        self.stream = gpu.handle("cuStreamCreate", OWN_STREAM)
        try:
            self._event = gpu.handle("cuEventCreate", NO_TIMING)
        except BaseException:
            gpu.drop("cuStreamDestroy_v2", self.stream)
            raise

    def is_free(self, stream: int | None) -> bool:
        """Whether a launch on the stream (None: on its own) has to wait for no other stream."""
        return not self._pending or self.last == (self.stream if stream is None else stream)

    def graph(self, key: tuple) -> Graph:
        """The graph of a kind ("full", "bare" or "device"), (batch, length) and blocks."""
        if key[0] != "device" and self._pending:
            self.settle()  # its staging memory is written next
        graph = self.graphs.get(key)
        if graph is None:
            self.settle()
            layout = self._plan.layout(*key[1:4])
            self._grow(layout, staging=key[0] != "device")
            graph = self._build(key, layout)
            while len(self.graphs) >= GRAPHS:
                self.graphs.popitem(last=False)[1].close()
            self.graphs[key] = graph
        else:
            self.graphs.move_to_end(key)
        return graph

    def _build(self, key: tuple, layout: Layout) -> Graph:
        base, constants = self._arena, None
        inputs = [base + array.offset for array in layout.inputs]
        if key[0] == "device":
            constants, inputs = self._constants(layout, key[4])
        staging = self._memory if key[0] != "device" else None
        try:
            return Graph(
                self._gpu, self._code, layout, base, inputs, staging, constants, key[0] == "full"
            )
        except BaseException:
            if constants is not None:
                self._gpu.drop("cuMemFree_v2", constants)
            raise

    def _constants(self, layout: Layout, present: tuple[str, ...]) -> tuple[int, list[int]]:
        """Bring up the table, and what inputs that are not given are filled with."""
        batch, length = layout.inputs[0].shape
        memory = np.zeros(layout.input_bytes, np.uint8)
        for array, name, default in zip(layout.inputs, self._names, self._defaults):
            if name not in present:
                view(memory, array, layout.output_bytes)[...] = filled(default, (batch, length))
        table = blocks_of(np.full(batch, length), BLOCK_TOKENS)
        view(memory, layout.inputs[-1], layout.output_bytes)[...] = table
        address = self._gpu.allocate(len(memory), "the inputs")
        try:
            source = memory.ctypes.data
            self._gpu.call("cuMemcpyHtoDAsync_v2", address, source, len(memory), self.stream)
            self._gpu.call("cuStreamSynchronize", self.stream)
        except BaseException:
            self._gpu.drop("cuMemFree_v2", address)
            raise
        shift = address - layout.output_bytes
        return address, [array.offset + shift for array in layout.inputs]

    def _grow(self, layout: Layout, staging: bool) -> None:
        """Take a larger arena or staging memory where the layout needs it; graphs end with them."""
        pinned = layout.input_bytes + layout.output_bytes if staging else 0
        if layout.bytes <= self._arena_bytes and pinned <= len(self._memory):
            return
        self._drop_graphs()
        if layout.bytes > self._arena_bytes:
            if self._arena:
                self._gpu.drop("cuMemFree_v2", self._arena)
            self._arena = self._arena_bytes = 0
            self._arena = self._gpu.allocate(_rounded(layout.bytes), "the activations")
            self._arena_bytes = _rounded(layout.bytes)
        if pinned > len(self._memory):
            if self._staging:
                self._gpu.drop("cuMemFreeHost", self._staging)
            self._staging, self._memory = 0, _NOTHING
            self._staging = self._gpu.pin(_rounded(pinned))
            self._memory = host_memory(self._staging, _rounded(pinned))

    def bring_up(self, layout: Layout) -> None:
        """Copy the inputs out of the staging memory, for a graph that does not."""
        target = self._arena + layout.output_bytes
        size = layout.input_bytes
        self._gpu.call("cuMemcpyHtoDAsync_v2", target, self._staging, size, self.stream)

    def launch(self, graph: Graph, stream: int) -> None:
        """Put the graph on a stream, behind what still runs in this workspace."""
        if self._pending and self.last != stream:
            if self.last == self.stream:
                self.settle()
            else:
                self._gpu.call("cuStreamWaitEvent", stream, self._event, 0)
        self.last, self._pending = stream, True
        self._gpu.call("cuGraphLaunch", graph.executable, stream)
        if stream != self.stream:
            self._gpu.call("cuEventRecord", self._event, stream)

    def wait(self) -> None:
        """Wait for the last launch."""
        self._gpu.call("cuStreamSynchronize", self.last)
        self._pending = False

    def settle(self) -> None:
        """Wait until nothing runs in this workspace any more."""
        if self._pending and self.last == self.stream:
            self._gpu.call("cuStreamSynchronize", self.stream)
        elif self._pending:
            self._gpu.call("cuEventSynchronize", self._event)
        self._pending = False

    def time(self, graph: Graph, repeats: int, warm: int) -> np.ndarray:
        """Milliseconds of each of `repeats` launches, after `warm` that do not count."""
        gpu, events = self._gpu, []
        try:
            events += [gpu.handle("cuEventCreate", 0) for _ in range(2 * repeats)]
            for _ in range(warm):
                self.launch(graph, self.stream)
            for begin, end in zip(events[::2], events[1::2]):
                gpu.call("cuEventRecord", begin, self.stream)
                self.launch(graph, self.stream)
                gpu.call("cuEventRecord", end, self.stream)
            self.wait()
            return np.array([_elapsed(gpu, *pair) for pair in zip(events[::2], events[1::2])])
        finally:
            for event in events:
                gpu.drop("cuEventDestroy_v2", event)

    def _drop_graphs(self) -> None:
        while self.graphs:
            self.graphs.popitem()[1].close()

    def close(self) -> None:
        if self._pending and self.last == self.stream:
            self._gpu.drop("cuStreamSynchronize", self.stream)
        elif self._pending:
            self._gpu.drop("cuEventSynchronize", self._event)
        self._drop_graphs()
        self._gpu.drop("cuEventDestroy_v2", self._event)
        self._gpu.drop("cuStreamDestroy_v2", self.stream)
        if self._arena:
            self._gpu.drop("cuMemFree_v2", self._arena)
        if self._staging:
            self._gpu.drop("cuMemFreeHost", self._staging)


_NOTHING = np.empty(0, np.uint8)


def _rounded(size: int) -> int:
    return -(-size >> 21) << 21  # the driver hands memory out in pieces of 2 MiB


def _elapsed(gpu: Gpu, begin: int, end: int) -> float:
    milliseconds = ctypes.c_float()
    gpu.call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
    return milliseconds.value
