"""Runs a library's function, one call at a time, with arguments and buffers of its own."""

from __future__ import annotations

import ctypes

import numpy as np

from bertile.loading.errors import BertileError
from bertile.loading.memory import empty
from bertile.loading.pool import host_of
from bertile.loading.tvm_abi import Object, Runtime, set_argument

SHAPES = 16  # whose buffers are kept for the next request


class Stream:
    """One call at a time into a library; several streams of one share its code and its weights.

    `module` is the loaded library, `dtypes` are those of its inputs, `params` its weights. Raises
    BertileError for a library that holds no function of the name `entry`.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: Object,
        entry: str,
        dtypes: list[str],
        params: list[Object],
        threads: int,
    ):
        self.host = host_of(runtime, threads)
        self._runtime, self._dtypes, self._params = runtime, dtypes, params
        self._machine = self._start(module)
        self._entry = self.find(entry)
        if self._entry is None:
            raise BertileError(f"it has no function '{entry}'")
        self._arguments = runtime.pack([0] * (len(dtypes) + 1) + params)
        self._buffers: dict[tuple, Buffers] = {}

    @property
    def closed(self) -> bool:
        return self._entry is None

    def backlog(self) -> int:
        """How many calls it is at, or has before it."""
        return self.host.backlog()

    def run(
        self,
        values: list,
        blocks: np.ndarray,
        shape: tuple[int, int],
        room: tuple[int, int],
        outputs: int,
    ) -> list[np.ndarray]:
        """Call the function on values, each an array of `shape` or a number, and their blocks.

        They are padded with 0 to `room`, and copied: nothing of theirs is needed later.
        """

        def call() -> list[np.ndarray]:
            held, entry = (self._arguments, self._params), self._entry
            if entry is None:  # else a handler that closes it from now on leaves this call its own
                raise BertileError("the model is closed", "load the bundle again")
            key = (room, blocks.shape)
            buffers = self._take(key, *held)
            try:
                buffers.fill(values, blocks, shape)
                result = self._runtime.call_packed(entry, buffers.arguments)
                return self._runtime.arrays(result, outputs)
            finally:
                if self._entry is not None:
                    self._buffers[key] = buffers

        return self.host.run(call)

    def find(self, name: str) -> Object | None:
        """A function of the library, by name."""
        find = self._runtime.function("ffi.ModuleGetFunction")
        return self._runtime.call(find, self._machine, name.encode(), False)

    def close(self) -> None:
        """Give back what it holds; the caller holds `pool.outside`. Later calls raise."""
        with self.host.lock:
            self._entry = self._machine = self._arguments = None
            self._params, self._buffers = [], {}
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

    def _take(self, key: tuple, arguments: ctypes.Array, params: list[Object]) -> Buffers:
        """Buffers that nobody else writes into until they are put back.

        A signal's handler may call the model while its thread is in the midst of another call.
        """
        buffers = self._buffers.pop(key, None)
        if buffers is not None:
            return buffers
        if len(self._buffers) >= SHAPES:
            # TVM's allocator keeps every freed buffer for the next request of exactly its size:
            # a server that sees every batch and length would keep all activations of each
            self._buffers.clear()
            self._runtime.call(self._runtime.function("vm.builtin.memory_manager.clear"))
        return Buffers(self._runtime, arguments, *key, self._dtypes, params)


class Buffers:
    """Aligned memory for the inputs of requests of one shape, and a call's arguments with it.

    `arguments` are those of the call, in which the inputs are still to be set; `params`, to which
    the others point, live as long.
    """

    def __init__(
        self,
        runtime: Runtime,
        arguments: ctypes.Array,
        room: tuple[int, int],
        table: tuple[int, ...],
        dtypes: list[str],
        params: list[Object],
    ):
        self._params = params
        self._inputs, self._table = [empty(room, dtype) for dtype in dtypes], empty(table, "int32")
        self._blocks: np.ndarray | None = None  # what the table holds
        self._tensors = [runtime.tensor(array) for array in (*self._inputs, self._table)]
        self.arguments = type(arguments).from_buffer_copy(arguments)
        for slot, tensor in zip(self.arguments, self._tensors):
            set_argument(slot, tensor)

    def fill(self, values: list, blocks: np.ndarray, shape: tuple[int, int]) -> None:
        """Write arrays of `shape`, or numbers, and the table of blocks; what they lack is 0."""
        for view, value in zip(self._inputs, values):
            if view.shape != shape:
                view.fill(0)
                view = view[: shape[0], : shape[1]]
            view[...] = value
        if blocks is not self._blocks:  # nobody writes into a plan, which many calls may share
            self._table[...] = self._blocks = blocks
