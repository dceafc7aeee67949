"""Runs a library's function, one call at a time, with arguments and buffers of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bertile.loading.errors import BertileError
from bertile.loading.exits import Left, Thresholds, run_stages
from bertile.loading.memory import empty
from bertile.loading.pool import host_of
from bertile.loading.tvm_abi import Object, Runtime, set_argument

SHAPES = 16  # whose buffers are kept for the next request


class Entry(NamedTuple):
    """A function of a library, and its arguments, in which the inputs are still to be set: one by
    one, the table of blocks, and states of a stage before; then its weights.
    """

    name: str
    function: Object
    arguments: ctypes.Array
    params: list[Object]


class Stream:
    """One call at a time into a library; several streams of one share its code and its weights.

    `module` is the loaded library, `dtypes` are those of its inputs, `params` its weights. `stages`
    are functions that run the model piece by piece, each with the weights and the number of states
    that it takes. Raises BertileError for a library that lacks `entry`, or one of them.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: Object,
        entry: str,
        dtypes: list[str],
        params: list[Object],
        threads: int,
        stages: Sequence[tuple[str, list[Object], int]] = (),
    ):
        self.host = host_of(runtime, threads)
        self._runtime, self._dtypes = runtime, dtypes
        self._machine = self._start(module)
        self._entries = [self._opened(*each) for each in ((entry, params), *stages)]
        self._buffers: dict[tuple, Buffers] = {}

    @property
    def closed(self) -> bool:
        return not self._entries

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
            entry = self._open_entries()[0]
            return self._runtime.arrays(self._call(entry, values, blocks, shape, room), outputs)

        return self.host.run(call)

    def run_stages(
        self, values: list, blocks: np.ndarray, shape: tuple[int, int], limits: Thresholds
    ) -> Left:
        """Run a pass stage by stage, each text as far as it needs, see `exits.run_stages`."""

        def call() -> Left:
            _, *stages = self._open_entries()

            def stage(
                number: int, values: list, blocks: np.ndarray, rows: int, states: list[np.ndarray]
            ) -> tuple[list[np.ndarray], np.ndarray]:
                room = (rows, shape[1])
                result = self._call(stages[number], values, blocks, room, room, states)
                *states, logits = self._runtime.views(result)
                return states, logits

            return run_stages(stage, limits, values, blocks, shape[0])

        return self.host.run(call)

    def find(self, name: str) -> Object | None:
        """A function of the library, by name."""
        find = self._runtime.function("ffi.ModuleGetFunction")
        return self._runtime.call(find, self._machine, name.encode(), False)

    def close(self) -> None:
        """Give back what it holds; the caller holds `pool.outside`. Later calls raise."""
        with self.host.lock:
            self._machine = None
            self._entries, self._buffers = [], {}
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

    def _opened(self, name: str, params: list[Object], states: int = 0) -> Entry:
        function = self.find(name)
        if function is None:
            raise BertileError(f"it has no function '{name}'")
        inputs = len(self._dtypes) + 1 + states
        return Entry(name, function, self._runtime.pack([0] * inputs + params), params)

    def _open_entries(self) -> list[Entry]:
        """The functions; a handler that closes the stream from now on leaves a call its own."""
        if not self._entries:
            raise BertileError("the model is closed", "load the bundle again")
        return self._entries

    def _call(
        self,
        entry: Entry,
        values: list,
        blocks: np.ndarray,
        shape: tuple[int, int],
        room: tuple[int, int],
        states: Sequence[np.ndarray] = (),
    ) -> Object:
        """Call a function on values of `shape`, their blocks, and the states of those."""
        key = (entry.name, room, blocks.shape)
        buffers = self._take(key, entry)
        try:
            buffers.fill(values, blocks, shape)
            tensors = [self._runtime.tensor(state) for state in states]
            for place, tensor in enumerate(tensors, len(values) + 1):
                set_argument(buffers.arguments[place], tensor)
            return self._runtime.call_packed(entry.function, buffers.arguments)
        finally:
            if self._entries:
                self._buffers[key] = buffers

    def _take(self, key: tuple, entry: Entry) -> Buffers:
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
        return Buffers(self._runtime, entry, *key[1:], self._dtypes)


class Buffers:
    """Aligned memory for the inputs of requests of one shape, and a call's arguments with it.

    The weights to which the others of the entry's arguments point live as long.
    """

    def __init__(
        self,
        runtime: Runtime,
        entry: Entry,
        room: tuple[int, int],
        table: tuple[int, ...],
        dtypes: list[str],
    ):
        self._params = entry.params
        self._inputs, self._table = [empty(room, dtype) for dtype in dtypes], empty(table, "int32")
        self._blocks: np.ndarray | None = None  # what the table holds
        self._tensors = [runtime.tensor(array) for array in (*self._inputs, self._table)]
        self.arguments = type(entry.arguments).from_buffer_copy(entry.arguments)
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
