"""An NVIDIA GPU through its driver, for those who measure kernels: memory, launches, times.

A launch that fails leaves the context of its process unusable: whoever tries candidates does so in
a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

import numpy as np

from bertile.cuda_loader import KernelNode, evaluate, open_driver
from bertile.errors import PlatformError
from bertile.schedules.cuda.source import Kernel

Value = Union[int, np.int32, np.float32]  # an address, or a number
POISON = 0xFF  # of every byte of a fresh buffer: a NaN in each floating-point type

_POINTER, _SIZE, _ADDRESS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
# Beside those that a loader calls.
_MORE = {
    "cuMemcpyDtoH_v2": (_POINTER, _ADDRESS, _SIZE),
    "cuMemcpyHtoD_v2": (_ADDRESS, _POINTER, _SIZE),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, _SIZE),
}
# CUdevice_attribute and CUfunction_attribute
_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR = 16, 38, 75, 76
_DYNAMIC_SHARED, _NOT_FOUND = 8, 500
_PLAIN_SHARED = 48 << 10  # that a kernel has without asking


class Card:
    """One device in its primary context. A context manager."""

    def __init__(self, ordinal: int = 0, driver: str | None = None) -> None:
        """Raises PlatformError where there is no driver or no such device."""
        self._driver = open_driver(driver)
        for name, types in _MORE.items():
            function = getattr(self._driver, name)
            function.argtypes, function.restype = types, ctypes.c_int
        count, device, context = ctypes.c_int(), ctypes.c_int(), _POINTER()
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGetCount", ctypes.byref(count))
        except RuntimeError as error:
            raise PlatformError(f"the NVIDIA driver does not start: {error}") from error
        if ordinal >= count.value:
            raise PlatformError(f"this machine has {count.value} CUDA devices")
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._device = device.value
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxPushCurrent_v2", context)
        self.capability = 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        self.l2_bytes = self._attribute(_L2_BYTES)
        self._stream = self._made("cuStreamCreate", 1)

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *exception: object) -> None:
        self.call("cuStreamDestroy_v2", self._stream)
        self.call("cuCtxPopCurrent_v2", ctypes.byref(_POINTER()))
        self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; RuntimeError with the driver's own words."""
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def facts(self) -> dict[str, Any]:
        """What a reader of a measurement wants to know of the device."""
        name, version = ctypes.create_string_buffer(256), ctypes.c_int()
        self.call("cuDeviceGetName", ctypes.addressof(name), len(name), self._device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return {
            "gpu": name.value.decode(),
            "capability": self.capability,
            "multiprocessors": self.multiprocessors,
            "l2_bytes": self.l2_bytes,
            "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
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
    def module(self, image: bytes) -> Iterator[_POINTER]:
        """A loaded cubin, or PTX."""
        text = ctypes.create_string_buffer(image, len(image) + 1)  # PTX ends with a zero
        module = _POINTER()
        self.call("cuModuleLoadDataEx", ctypes.byref(module), ctypes.addressof(text), 0, None, None)
        try:
            yield module
        finally:
            self.call("cuModuleUnload", module)

    @contextlib.contextmanager
    def graph(
        self, module: _POINTER, calls: Sequence[tuple[Kernel, Mapping[str, int], Mapping[str, int]]]
    ) -> Iterator[_POINTER]:
        """A CUDA graph of calls one after the other; a call is a kernel, the addresses of its
        operands and of its scratch by name, and its symbols.
        """
        graph = self._made("cuGraphCreate", 0)
        execution, held, last = _POINTER(), [], None
        try:
            for kernel, addresses, symbols in calls:
                for launch in kernel.launches:
                    if evaluate(launch.when, symbols) <= 0:
                        continue
                    grid = [evaluate(extent, symbols) for extent in launch.grid]
                    values = [
                        np.uint64(addresses[name]) if name in addresses else np.int32(symbols[name])
                        for name in launch.arguments
                    ]
                    function = self._function(module, launch.entry, launch.shared)
                    last = self._node(
                        graph, last, function, grid, (launch.threads, launch.shared), values, held
                    )
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(execution), graph, 0)
            yield execution
        finally:
            if execution:
                self.call("cuGraphExecDestroy", execution)
            self.call("cuGraphDestroy", graph)

    def milliseconds(self, execution: _POINTER, replays: int = 1) -> float:
        """Run a graph so often and wait for it; the time by events before and behind."""
        begin, end = self._made("cuEventCreate", 0), self._made("cuEventCreate", 0)
        elapsed = ctypes.c_float()
        try:
            self.call("cuEventRecord", begin, self._stream)
            for _ in range(replays):
                self.call("cuGraphLaunch", execution, self._stream)
            self.call("cuEventRecord", end, self._stream)
            self.call("cuEventSynchronize", end)
            self.call("cuEventElapsedTime", ctypes.byref(elapsed), begin, end)
        finally:
            self.call("cuEventDestroy_v2", begin)
            self.call("cuEventDestroy_v2", end)
        return elapsed.value

    def _node(
        self,
        graph: _POINTER,
        last: _POINTER | None,
        function: _POINTER,
        grid: Sequence[int],
        shape: tuple[int, int],
        values: Sequence[Any],
        held: list[Any],
    ) -> _POINTER:
        """A launch behind the last one; the driver copies its arguments when the node is made."""
        places = (_POINTER * max(1, len(values)))()
        arrays = [np.array([value]) for value in values]
        for place, array in enumerate(arrays):
            places[place] = array.ctypes.data
        node, threads, shared = _POINTER(), *shape
        parameters = KernelNode(
            function, (*grid,), (threads, 1, 1), shared, ctypes.addressof(places), None
        )
        before = (_POINTER * 1)(last)
        self.call(
            "cuGraphAddKernelNode",
            ctypes.byref(node),
            graph,
            ctypes.addressof(before) if last else None,
            int(last is not None),
            ctypes.byref(parameters),
        )
        held += [places, arrays]
        return node

    def _function(self, module: _POINTER, entry: str, shared: int) -> _POINTER:
        function = _POINTER()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        if shared > _PLAIN_SHARED:
            self.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared)
        return function

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _made(self, name: str, flags: int) -> _POINTER:
        handle = _POINTER()
        self.call(name, ctypes.byref(handle), flags)
        return handle


class Memory:
    """Buffers on a card."""

    def __init__(self, card: Card) -> None:
        self._card, self._addresses = card, []

    def empty(self, size: int) -> int:
        """The address of so many poisoned bytes."""
        address = _ADDRESS()
        self._card.call("cuMemAlloc_v2", ctypes.byref(address), max(1, size))
        self._addresses.append(address.value)
        self.poison(address.value, size)
        return address.value

    def poison(self, address: int, size: int) -> None:
        """Fill a buffer with what no kernel may leave in its result."""
        if size:
            self._card.call("cuMemsetD8_v2", address, POISON, size)

    def upload(self, array: np.ndarray) -> int:
        """The address of an array's copy."""
        array = np.ascontiguousarray(array)
        address = self.empty(array.nbytes)
        if array.nbytes:
            self._card.call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
        return address

    def download(self, address: int, like: np.ndarray) -> np.ndarray:
        """A buffer's content as an array of another's form."""
        found = np.empty(like.shape, like.dtype)
        if found.nbytes:
            self._card.call("cuMemcpyDtoH_v2", found.ctypes.data, address, found.nbytes)
        return found

    def free(self) -> None:
        """Give everything back."""
        while self._addresses:
            self._card.call("cuMemFree_v2", self._addresses.pop())
