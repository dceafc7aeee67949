"""A CUDA driver made of Python functions, for tests of the CUDA loader.

It does everything as late as it may: what is put on a stream runs when somebody waits for it, so
that a missing wait gives wrong numbers. Memory of the device is memory of this process. Wrong use
(an unknown handle, an address that was given back) is refused, and kept in `misuse`.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Mapping

from bertile import cuda_loader

INVALID, OUT_OF_MEMORY = 1, 2
NAMES = {
    INVALID: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    OUT_OF_MEMORY: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    218: (b"CUDA_ERROR_INVALID_PTX", b"a PTX JIT compilation failed"),
    222: (b"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", b"the provided PTX was too new"),
    500: (b"CUDA_ERROR_NOT_FOUND", b"named symbol not found"),
    700: (b"CUDA_ERROR_ILLEGAL_ADDRESS", b"an illegal memory access was encountered"),
    999: (b"CUDA_ERROR_UNKNOWN", b"unknown error"),
}


class Misuse(Exception):
    """The driver was called as it must not be."""


class Stream:
    """Work that waits to be done, each piece numbered."""

    def __init__(self) -> None:
        self.waiting: collections.deque[Callable[[], None]] = collections.deque()
        self.put = self.done = 0

    def add(self, piece: Callable[[], None]) -> None:
        self.waiting.append(piece)
        self.put += 1

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.waiting.popleft()()


class Driver:
    """Functions as a ctypes library has them. `kernels` gives a Python function for each entry.

    A kernel is called with its grid and the address of its array of addresses of arguments.
    `fail` gives codes that functions answer in the place of doing something.
    """

    def __init__(
        self,
        kernels: Mapping[str, Callable],
        capability: tuple[int, int] = (9, 0),
        version: int = 13000,
        devices: int = 1,
        memory: int = 1 << 30,
    ):
        self.kernels, self.capability, self.version = dict(kernels), capability, version
        self.devices, self.memory = devices, memory
        self.calls: collections.Counter[str] = collections.Counter()
        self.fail: dict[str, int] = {}
        self.misuse: list[str] = []
        self.current: dict[int, int] = collections.Counter()
        self.retained = 0
        self.images: list[bytes] = []
        self._buffers: dict[int, tuple] = {}  # address: kind, ctypes buffer
        self._objects: dict[int, object] = {0: Stream()}
        self._handles = itertools.count(0x1000, 16)
        self._lock = threading.RLock()
        for name, types in cuda_loader.FUNCTIONS.items():
            make = ctypes.CFUNCTYPE(ctypes.c_int, *types)
            setattr(self, name, make(functools.partial(self._enter, name)))

    def held(self) -> dict[str, int]:
        """What is not given back: bytes by kind of memory, and objects by kind."""
        held: collections.Counter[str] = collections.Counter()
        for kind, buffer in self._buffers.values():
            held[kind] += len(buffer)
        for handle, resource in self._objects.items():
            held[type(resource).__name__.lower()] += handle != 0
        return {kind: count for kind, count in held.items() if count}

    def stream(self) -> int:
        """A stream of somebody else's."""
        return self._new(Stream())

    def finish(self) -> None:
        """Do all work that waits."""
        for resource in list(self._objects.values()):
            if isinstance(resource, Stream):
                resource.run(resource.put)

    def _enter(self, name: str, *arguments) -> int:
        with self._lock:
            self.calls[name] += 1
            if name in self.fail:
                return self.fail[name]
            free = ("cuInit", "cuDriver", "cuDevice", "cuGetError", "cuCtx")
            try:
                if not name.startswith(free) and not self.current[threading.get_ident()]:
                    raise Misuse("no context is current")
                return getattr(self, f"_{name}")(*arguments) or 0
            except Exception as error:  # a callback cannot raise
                self.misuse.append(f"{name}: {error!r}")
                return INVALID

    def _new(self, resource: object) -> int:
        handle = next(self._handles)
        self._objects[handle] = resource
        return handle

    def _get(self, handle: int | None, kind: type) -> object:
        resource = self._objects.get(handle or 0)
        if not isinstance(resource, kind):
            raise Misuse(f"{handle} is no {kind.__name__}")
        return resource

    def _take(self, address: int, kind: str) -> None:
        if self._buffers.get(address, ("",))[0] != kind:
            raise Misuse(f"{address} is no {kind} memory")
        del self._buffers[address]

    def _inside(self, address: int | None, size: int, kind: str) -> int:
        for begin, (memory, buffer) in self._buffers.items():
            if memory == kind and begin <= (address or 0) <= begin + len(buffer) - size:
                return address
        raise Misuse(f"{size} bytes at {address} are not {kind} memory")

    def _allocate(self, place: int, size: int, kind: str, limit: int) -> int:
        used = sum(len(buffer) for memory, buffer in self._buffers.values() if memory == kind)
        if used + size > limit:
            return OUT_OF_MEMORY
        buffer = (ctypes.c_uint8 * (size + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(address, 0xFF, size)  # NaN where nothing was written
        piece = (ctypes.c_uint8 * size).from_buffer(buffer, address - ctypes.addressof(buffer))
        self._buffers[address] = kind, piece
        return _write(place, address)

    # the functions, in the order of cuda_loader.FUNCTIONS

    def _cuInit(self, flags):
        pass

    def _cuDriverGetVersion(self, place):
        return _write_int(place, self.version)

    def _cuGetErrorName(self, code, place):
        return _write_text(place, NAMES[code][0]) if code in NAMES else INVALID

    def _cuGetErrorString(self, code, place):
        return _write_text(place, NAMES[code][1]) if code in NAMES else INVALID

    def _cuDeviceGetCount(self, place):
        return _write_int(place, self.devices)

    def _cuDeviceGet(self, place, ordinal):
        return _write_int(place, ordinal)

    def _cuDeviceGetName(self, place, size, device):
        ctypes.memmove(place, b"Lazy GPU\0", 9)

    def _cuDeviceGetAttribute(self, place, number, device):
        return _write_int(place, dict(zip((75, 76), self.capability))[number])

    def _cuDevicePrimaryCtxRetain(self, place, device):
        self.retained += 1
        return _write(place, 0xC0)

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.retained -= 1

    def _cuCtxPushCurrent_v2(self, context):
        if context != 0xC0 or not self.retained:
            raise Misuse(f"{context} is no context")
        self.current[threading.get_ident()] += 1

    def _cuCtxPopCurrent_v2(self, place):
        if not self.current[threading.get_ident()]:
            raise Misuse("no context is current")
        self.current[threading.get_ident()] -= 1
        return _write(place, 0xC0)

    def _cuMemGetInfo_v2(self, free, total):
        used = self.held().get("device", 0)
        return _write(free, self.memory - used) or _write(total, self.memory)

    def _cuMemAlloc_v2(self, place, size):
        return self._allocate(place, size, "device", self.memory)

    def _cuMemFree_v2(self, address):
        self.finish()  # as the real one waits
        self._take(address, "device")

    def _cuMemHostAlloc(self, place, size, flags):
        return self._allocate(place, size, "pinned", 1 << 30)

    def _cuMemFreeHost(self, address):
        self._take(address, "pinned")

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        self._inside(target, size, "device")
        self._get(stream, Stream).add(lambda: ctypes.memmove(target, source, size))

    def _cuModuleLoadDataEx(self, place, image, count, options, values):
        self.images.append(ctypes.string_at(image))
        return _write(place, self._new(Module()))

    def _cuModuleUnload(self, module):
        for handle in (*self._get(module, Module).functions, module):
            del self._objects[handle]

    def _cuModuleGetFunction(self, place, module, name):
        self._get(module, Module)
        if name.decode() not in self.kernels:
            return 500
        handle = self._new(self.kernels[name.decode()])
        self._get(module, Module).functions.append(handle)
        return _write(place, handle)

    def _cuFuncSetAttribute(self, function, attribute, value):
        if attribute != 8 or value > 227 << 10:
            return INVALID

    def _cuStreamCreate(self, place, flags):
        return _write(place, self._new(Stream()))

    def _cuStreamDestroy_v2(self, stream):
        self._cuStreamSynchronize(stream)
        del self._objects[stream]

    def _cuStreamSynchronize(self, stream):
        queue = self._get(stream, Stream)
        queue.run(queue.put)

    def _cuStreamWaitEvent(self, stream, event, flags):
        mark = self._get(event, Event).mark
        self._get(stream, Stream).add(lambda: mark and mark[0].run(mark[1]))

    def _cuEventCreate(self, place, flags):
        return _write(place, self._new(Event()))

    def _cuEventDestroy_v2(self, event):
        self._get(event, Event)
        del self._objects[event]

    def _cuEventRecord(self, event, stream):
        queue = self._get(stream, Stream)
        self._get(event, Event).mark = (queue, queue.put)

    def _cuEventSynchronize(self, event):
        mark = self._get(event, Event).mark
        if mark:
            mark[0].run(mark[1])

    def _cuEventElapsedTime(self, place, begin, end):
        first, last = (self._get(event, Event).mark for event in (begin, end))
        if last[0].done < last[1] or first[1] > last[1]:
            raise Misuse("the events are not done, or not in order")
        ctypes.c_float.from_address(place).value = 0.5

    def _cuGraphCreate(self, place, flags):
        return _write(place, self._new(Graph()))

    def _cuGraphDestroy(self, graph):
        self._get(graph, Graph)
        del self._objects[graph]

    def _node(self, place, graph, waits, count, params):
        before = [(ctypes.c_void_p * count).from_address(waits)[i] for i in range(count)]
        nodes = self._get(graph, Graph).nodes
        if not set(before) <= set(nodes):
            raise Misuse("a node waits for one that is not in its graph")
        handle = next(self._handles)
        nodes[handle] = (before, params)
        return _write(place, handle)

    def _cuGraphAddKernelNode(self, place, graph, waits, count, params):
        return self._node(place, graph, waits, count, self._kernel(params))

    def _kernel(self, params):
        """A copy of a kernel node's parameters, as the driver makes one."""
        node = cuda_loader.KernelNode.from_address(params)
        kernel = self._objects.get(node.function)
        if kernel not in self.kernels.values():
            raise Misuse(f"{node.function} is no function")
        count = kernel.arguments
        places = (ctypes.c_void_p * count).from_address(node.arguments)
        cells = [ctypes.c_uint64.from_address(places[i]).value for i in range(count)]
        return functools.partial(kernel, tuple(node.grid), tuple(node.block), cells)

    def _cuGraphAddMemcpyNode(self, place, graph, waits, count, params, context):
        node = cuda_loader.MemcpyNode.from_address(params)
        kinds = node.source_kind, node.target_kind
        if (node.height, node.depth) != (1, 1) or kinds not in ((1, 2), (2, 1)):
            raise Misuse("the copy is not of one row")
        source, target, size = node.source_device, node.target_host, node.bytes
        if kinds == (1, 2):
            source, target = node.source_host, node.target_device
        device, pinned = (target, source) if kinds == (1, 2) else (source, target)
        self._inside(device, size, "device")
        self._inside(pinned, size, "pinned")
        return self._node(place, graph, waits, count, lambda: ctypes.memmove(target, source, size))

    def _cuGraphInstantiateWithFlags(self, place, graph, flags):
        nodes = dict(self._get(graph, Graph).nodes)
        return _write(place, self._new(Executable(nodes)))

    def _cuGraphExecKernelNodeSetParams(self, executable, node, params):
        instance = self._get(executable, Executable)
        if not any(isinstance(g, Graph) and node in g.nodes for g in self._objects.values()):
            raise Misuse("the node's graph is gone")
        instance.nodes = {**instance.nodes, node: (instance.nodes[node][0], self._kernel(params))}

    def _cuGraphExecDestroy(self, executable):
        self._get(executable, Executable)
        del self._objects[executable]

    def _cuGraphLaunch(self, executable, stream):
        instance, queue = self._get(executable, Executable), self._get(stream, Stream)
        nodes = instance.nodes  # as they are now: later changes are for later launches
        queue.add(lambda: _run(nodes))


class Module:
    def __init__(self) -> None:
        self.functions: list[int] = []


class Event:
    mark: tuple[Stream, int] | None = None


class Graph:
    def __init__(self) -> None:
        self.nodes: dict[int, tuple] = {}


class Executable:
    def __init__(self, nodes: dict[int, tuple]) -> None:
        self.nodes = nodes


def _run(nodes: Mapping[int, tuple]) -> None:
    """The last nodes first, as far as their dependencies allow."""
    done: set[int] = set()

    def visit(handle: int) -> None:
        if handle not in done:
            done.add(handle)
            for earlier in reversed(nodes[handle][0]):
                visit(earlier)
            nodes[handle][1]()

    for handle in reversed(nodes):
        visit(handle)


def _write(place: int, value: int) -> int:
    ctypes.c_uint64.from_address(place).value = value
    return 0


def _write_int(place: int, value: int) -> int:
    ctypes.c_int.from_address(place).value = value
    return 0


def _write_text(place: int, text: bytes) -> int:
    return _write(place, ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p).value)
