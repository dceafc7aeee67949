"""Runs a library's function in a thread of its own, with arguments and buffers of its own."""

from __future__ import annotations

import numpy as np

from bertile.loading.errors import BertileError
from bertile.loading.memory import aligned
from bertile.loading.pool import Host
from bertile.loading.tvm_abi import Object, Runtime, set_argument

SHAPES = 16  # whose buffers are kept for the next request


class Stream:
    """One call at a time into a library; several streams of one share its code and its weights.

    `module` is the loaded library, `params` are its weights. Raises BertileError for a library
    that holds no function of the name `entry`.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: Object,
        entry: str,
        inputs: int,
        params: list[Object],
        threads: int,
    ):
        self.host = Host(runtime, threads)
        self._runtime = runtime
        self._machine = self._start(module)
        self._entry = self.find(entry)
        if self._entry is None:
            raise BertileError(f"it has no function '{entry}'")
        self._arguments = runtime.pack([0] * inputs + params)
        self._shapes: set[tuple[int, ...]] = set()

    @property
    def closed(self) -> bool:
        return self._entry is None

    def backlog(self) -> int:
        """How many calls it is at, or has before it."""
        return self.host.backlog()

    def run(self, arrays: list[np.ndarray], blocks: np.ndarray, outputs: int) -> list[np.ndarray]:
        """Call the function with aligned (batch, length) inputs and the table of blocks."""

        def call() -> list[np.ndarray]:
            if self._entry is None:
                raise BertileError("the model is closed", "load the bundle again")
            self._limit_pool(arrays[0].shape, blocks.shape)
            tensors = [self._runtime.tensor(array) for array in (*arrays, table)]
            for slot, tensor in zip(self._arguments, tensors):
                set_argument(slot, tensor)
            result = self._runtime.call_packed(self._entry, self._arguments)
            return self._runtime.arrays(result, outputs)

        table = aligned(blocks, "int32")
        return self.host.run(call)

    def find(self, name: str) -> Object | None:
        """A function of the library, by name."""
        find = self._runtime.function("ffi.ModuleGetFunction")
        return self._runtime.call(find, self._machine, name.encode(), False)

    def close(self) -> None:
        """Give back what it holds; the caller holds `pool.outside`. Later calls raise."""
        with self.host.lock:
            self._entry = self._machine = self._arguments = None
            self.host.close()

    def _start(self, module: Object) -> Object:
        runtime = self._runtime
        find = runtime.function("ffi.ModuleGetFunction")
        start = runtime.call(find, module, b"vm_load_executable", False)
        if start is None:
            raise BertileError("it holds no compiled model")
        machine = runtime.call(start)
        cpu, device, pooled = 1, 0, 2
        runtime.call(runtime.call(find, machine, b"vm_initialization", False), cpu, device, pooled)
        return machine

    def _limit_pool(self, *shapes: tuple[int, ...]) -> None:
        # TVM's allocator keeps every freed buffer for the next request of exactly its size: without
        # a limit, a server that sees every batch and length would keep all activations of each.
        key = tuple(size for shape in shapes for size in shape)
        if key not in self._shapes:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
                self._runtime.call(self._runtime.function("vm.builtin.memory_manager.clear"))
            self._shapes.add(key)
