"""Gives those who measure kernels an NVIDIA GPU: memory, graphs of launches, and their times.

A launch that fails leaves the context of its process unusable: whoever tries candidates does so in
a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bertile.cuda_loader import DRIVER, Gpu, KernelNode, evaluate, open_driver
from bertile.schedules.cuda.source import Kernel, Launch

POISON = 0xFF  # of every byte of a fresh buffer: a NaN in each floating-point type
Call = tuple[Kernel, Mapping[str, int], Mapping[str, int]]  # addresses by name, symbols

_POINTER, _SIZE, _ADDRESS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
# Beside those that a loader calls.
_MORE = {
    "cuMemcpyDtoH_v2": (_POINTER, _ADDRESS, _SIZE),
    "cuMemcpyHtoD_v2": (_ADDRESS, _POINTER, _SIZE),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, _SIZE),
}
# CUdevice_attribute and CUfunction_attribute
_MULTIPROCESSORS, _L2_BYTES, _DYNAMIC_SHARED = 16, 38, 8
_PLAIN_SHARED = 48 << 10  # that a kernel has without asking


class Card(Gpu):
    """One device. Its context is the current one of a thread inside `with card`."""

    def __init__(self, ordinal: int = 0, driver: str = DRIVER) -> None:
        """Raises PlatformError where there is no driver or no such device."""
        library = open_driver(driver)
        super().__init__(library, ordinal)
        for name, types in _MORE.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function
        self.l2_bytes = self.attribute(_L2_BYTES)

    def facts(self) -> dict[str, Any]:
        """What a reader of a measurement wants to know of the device."""
        return {
            "gpu": self.name,
            "capability": 10 * self.capability[0] + self.capability[1],
            "multiprocessors": self.attribute(_MULTIPROCESSORS),
            "l2_bytes": self.l2_bytes,
            "cuda": f"{self.driver // 1000}.{self.driver % 1000 // 10}",
        }

    @contextlib.contextmanager
    def memory(self) -> Iterator[Memory]:
        """Buffers that are given back together."""
        memory = Memory(self)
        try:
            yield memory
        finally:
            memory.free()

    @contextlib.contextmanager
    def module(self, image: bytes) -> Iterator[int]:
        """A loaded cubin, or PTX."""
        text = ctypes.create_string_buffer(image, len(image) + 1)  # PTX ends with a zero
        module = self.handle("cuModuleLoadDataEx", ctypes.addressof(text), 0, None, None)
        try:
            yield module
        finally:
            self.drop("cuModuleUnload", module)

    @contextlib.contextmanager
    def graph(self, module: int, calls: Sequence[Call]) -> Iterator[int]:
        """A CUDA graph of calls of kernels, one after the other."""
        graph = self.handle("cuGraphCreate", 0)
        try:
            last = None
            for kernel, addresses, symbols in calls:
                for launch in kernel.launches:
                    if evaluate(launch.when, symbols) > 0:
                        last = self._add(graph, last, module, launch, addresses, symbols)
            executable = self.handle("cuGraphInstantiateWithFlags", graph, 0)
            try:
                yield executable
            finally:
                self.drop("cuGraphExecDestroy", executable)
        finally:
            self.drop("cuGraphDestroy", graph)

    def milliseconds(self, executable: int, replays: int = 1) -> float:
        """Run a graph so often and wait for it; the time by events before and behind."""
        begin, end = self.handle("cuEventCreate", 0), self.handle("cuEventCreate", 0)
        elapsed = ctypes.c_float()
        try:
            self.call("cuEventRecord", begin, None)
            for _ in range(replays):
                self.call("cuGraphLaunch", executable, None)
            self.call("cuEventRecord", end, None)
            self.call("cuEventSynchronize", end)
            self.call("cuEventElapsedTime", ctypes.byref(elapsed), begin, end)
        finally:
            self.drop("cuEventDestroy_v2", begin)
            self.drop("cuEventDestroy_v2", end)
        return elapsed.value

    def _add(
        self,
        graph: int,
        last: int | None,
        module: int,
        launch: Launch,
        addresses: Mapping[str, int],
        symbols: Mapping[str, int],
    ) -> int:
        """A launch behind the last one; the driver copies the arguments."""
        function = self.handle("cuModuleGetFunction", module, launch.entry.encode())
        if launch.shared > _PLAIN_SHARED:
            self.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, launch.shared)
        values = {**symbols, **addresses}
        # of an integer of 32 bits the first four of these bytes are read
        cells = (ctypes.c_uint64 * len(launch.arguments))(*map(values.get, launch.arguments))
        size = ctypes.sizeof(ctypes.c_uint64)
        places = [ctypes.addressof(cells) + size * place for place in range(len(cells))]
        arguments = (_POINTER * len(cells))(*places)
        grid = [evaluate(extent, symbols) for extent in launch.grid]
        node = KernelNode(
            function,
            (*grid,),
            (launch.threads, 1, 1),
            launch.shared,
            ctypes.addressof(arguments),
            None,
        )
        before = (_POINTER * 1)(last) if last else None
        wait = (ctypes.addressof(before), 1) if last else (None, 0)
        return self.handle("cuGraphAddKernelNode", graph, *wait, ctypes.byref(node))


class Memory:
    """Buffers on a card."""

    def __init__(self, card: Card) -> None:
        self._card, self._addresses = card, []

    def empty(self, size: int) -> int:
        """The address of so many bytes that are what no kernel may leave in its result."""
        address = self._card.allocate(size, "the operands of a trial")
        self._addresses.append(address)
        if size:
            self._card.call("cuMemsetD8_v2", address, POISON, size)
        return address

    def upload(self, array: np.ndarray) -> int:
        """The address of an array's copy."""
        array = np.ascontiguousarray(array)
        address = self.empty(array.nbytes)
        if array.nbytes:
            self._card.call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
        return address

    def download(self, address: int, like: np.ndarray) -> np.ndarray:
        """A buffer's content as an array of another's form."""
        array = np.empty(like.shape, like.dtype)
        if array.nbytes:
            self._card.call("cuMemcpyDtoH_v2", array.ctypes.data, address, array.nbytes)
        return array

    def free(self) -> None:
        """Give everything back."""
        while self._addresses:
            self._card.drop("cuMemFree_v2", self._addresses.pop())
