"""Hands results out on the device, where torch and cupy take them over without a copy."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections import OrderedDict

import numpy as np

from bertile.loading.cuda.driver import INT, POINTER
from bertile.loading.cuda.gpu import LEGACY, NO_TIMING, Gpu
from bertile.loading.cuda.layout import Array, aligned_size
from bertile.loading.errors import BertileError, InputError
from bertile.loading.tvm_abi import DLManagedTensor, DLTensor

CACHED = 64  # results on the device that were given back and are kept for the next request
ON_GPU = 2  # a DLDeviceType
CAPSULE = b"dltensor"  # the name of a capsule that nobody has taken over yet


class DeviceArray:
    """A result on the GPU, which torch, cupy and whatever else reads DLPack take over in place.

    Its memory goes back to the model when the last that uses it is gone.
    """

    def __init__(self, block: _Block, shape: tuple[int, ...], dtype: np.dtype):
        self._block, self.shape, self.dtype = block, shape, dtype

    @property
    def pointer(self) -> int:
        """Its address on the device."""
        return self._block.address

    def __dlpack_device__(self) -> tuple[int, int]:
        return ON_GPU, self._block.gpu.ordinal

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A capsule that holds the array until its consumer calls the deleter.

        Work that the consumer puts on `stream` runs after the model has written the array.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a result of the model is given as it is, not copied")
        if stream != -1:
            self._block.lend(stream_handle(stream))
        new, delete, destroy = _capsules()
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        code, bits = {"i": 0, "u": 1, "f": 2}[self.dtype.kind], self.dtype.itemsize * 8
        tensor = DLTensor(self.pointer, *self.__dlpack_device__(), len(sizes), code, bits, 1, sizes)
        managed = DLManagedTensor(tensor, None, ctypes.cast(delete, POINTER))
        address = ctypes.addressof(managed)
        _exported[address] = managed, sizes, self._block
        return new(address, CAPSULE, ctypes.cast(destroy, POINTER))

    @property
    def __cuda_array_interface__(self) -> dict:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "stream": self._block.stream or LEGACY,
        }

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype}, GPU {self._block.gpu.ordinal})"


_exported: dict[int, tuple] = {}  # what lives until the deleter of a DLManagedTensor is called


@functools.cache
def _capsules() -> tuple:
    """PyCapsule_New, the deleter of our tensors, and the destructor of capsules nobody took."""
    new, valid, pointer = (
        ctypes.pythonapi[f"PyCapsule_{name}"] for name in ("New", "IsValid", "GetPointer")
    )
    new.argtypes, new.restype = (POINTER, ctypes.c_char_p, POINTER), ctypes.py_object
    for function, result in ((valid, INT), (pointer, POINTER)):
        function.argtypes, function.restype = (POINTER, ctypes.c_char_p), result

    def delete(address: int) -> None:
        _exported.pop(address, None)

    def destroy(capsule: int) -> None:  # as an address: the object has no references any more
        if valid(capsule, CAPSULE):
            delete(pointer(capsule, CAPSULE))

    return new, ctypes.CFUNCTYPE(None, POINTER)(delete), ctypes.PYFUNCTYPE(None, POINTER)(destroy)


class _Block:
    """Memory of one result, written on one stream; it goes back when nothing refers to it."""

    def __init__(self, results: Results, address: int, size: int, stream: int):
        self._results, self.gpu = results, results.gpu
        self.address, self.size, self.stream = address, size, stream
        self.borrowers: set[int] = set()  # other streams that may use it

    def lend(self, stream: int) -> None:
        """Let a stream wait for what is now on the block's own."""
        if stream != self.stream:
            self.borrowers.add(stream)
            with self.gpu:
                _follow(self.gpu, stream, self.stream)

    def __del__(self):
        if not sys.is_finalizing():
            self._results.give_back(self)


class Results:
    """Memory of results: what comes back is used again by the next request on the same stream."""

    def __init__(self, gpu: Gpu):
        self.gpu, self._closed = gpu, False
        self._free: OrderedDict[tuple[int, int], list[int]] = OrderedDict()
        self._lock = threading.RLock()  # a block may go back while the collector runs in `take`

    def take(self, array: Array, stream: int) -> DeviceArray:
        """Return memory for an array that is written on a stream."""
        size = aligned_size(array.bytes)
        with self._lock:
            kept = self._free.get((stream, size))
            address = kept.pop() if kept else None
        if address is None:
            address = self.gpu.allocate(size, "the outputs")
        return DeviceArray(_Block(self, address, size, stream), array.shape, array.dtype)

    def give_back(self, block: _Block) -> None:
        try:
            self.gpu.check()
            with self.gpu:
                for stream in block.borrowers:
                    _follow(self.gpu, block.stream, stream)
        except BertileError:  # the device is lost, or a stream has ended
            self.gpu.drop("cuMemFree_v2", block.address)
            return
        with self._lock:
            if not self._closed:
                self._free.setdefault((block.stream, block.size), []).append(block.address)
                self._free.move_to_end((block.stream, block.size))
            surplus = self._surplus(0 if self._closed else CACHED)
        for address in [block.address] if self._closed else surplus:
            self.gpu.drop("cuMemFree_v2", address)

    def _surplus(self, limit: int) -> list[int]:
        """Take out what is beyond the limit, the longest unused first."""
        count = sum(map(len, self._free.values())) - limit
        surplus: list[int] = []
        while len(surplus) < count:
            key, kept = next(iter(self._free.items()))
            if kept:
                surplus.append(kept.pop())
            else:
                del self._free[key]
        return surplus

    def clear(self) -> None:
        """Give the device what no result holds."""
        with self._lock:
            surplus = self._surplus(0)
        for address in surplus:
            self.gpu.drop("cuMemFree_v2", address)

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self.clear()


def _follow(gpu: Gpu, stream: int, other: int) -> None:
    """Let `stream` wait for what is on `other` by now."""
    event = gpu.handle("cuEventCreate", NO_TIMING)
    try:
        gpu.call("cuEventRecord", event, other)
        gpu.call("cuStreamWaitEvent", stream, event, 0)
    finally:
        gpu.drop("cuEventDestroy_v2", event)


def stream_handle(stream) -> int:
    """The driver's handle of a stream of torch or cupy, or of an integer; 0 is the default one."""
    for name in ("cuda_stream", "ptr"):
        stream = getattr(stream, name, stream)
    if stream is None or stream == LEGACY:
        return 0
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < 0:
        raise InputError(f"stream is {stream!r}", "give an integer, or a stream of torch or cupy")
    return stream
