"""Calls TVM through the C ABI of libtvm_ffi: functions, objects, tensors and errors."""

from __future__ import annotations

import ctypes
import math
import os

import numpy as np

from bertile.loading.errors import AGAIN, BertileError, BundleError, PlatformError
from bertile.loading.memory import ALIGNMENT, address_of
from bertile.loading.threads import set_thread_defaults

_NONE, _INT, _BOOL, _RAW_STR, _OBJECT = 0, 1, 2, 8, 64  # TVMFFITypeIndex; objects are from 64 on
_STRING, _TENSOR, _ARRAY = 65, 70, 71
# threading::MaxConcurrency and SetMaxConcurrency, of one thread, as compilers for Linux name them
_THREADS = "_ZN3tvm7runtime9threading14MaxConcurrencyEv"
_SET_THREADS = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_HEADER = 24  # bytes of TVMFFIObject, before the object's own fields


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Value(ctypes.Union):
    _fields_ = (
        ("integer", ctypes.c_int64),
        ("pointer", ctypes.c_void_p),
        ("text", ctypes.c_char_p),
    )


class _Any(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", _Value))


class _Sequence(ctypes.Structure):  # TVMFFISeqCell, with which an array's own fields begin
    _fields_ = (("items", ctypes.POINTER(_Any)), ("size", ctypes.c_int64))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


_DTYPES_OF = {
    (code, size * 8): np.dtype(f"{kind}{size}")
    for code, kind, sizes in ((0, "i", (1, 2, 4, 8)), (1, "u", (1, 2, 4, 8)), (2, "f", (2, 4, 8)))
    for size in sizes
}


class DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Object:
    """One reference to an object of TVM, given back when Python drops it."""

    __slots__ = ("_release", "handle", "keep", "kind")

    def __init__(self, kind: int, handle: int, release, keep=None):
        self.kind, self.handle, self.keep, self._release = kind, handle, keep, release

    def __del__(self):
        self._release(self.handle)


class Runtime:
    """The two runtime libraries of one process: functions, calls, tensors and errors."""

    def __init__(self, *paths: str):
        set_thread_defaults()
        try:
            ffi, runtime = (ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in paths)
        except OSError as error:
            raise PlatformError(f"cannot load the TVM runtime: {error}") from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self._call = _prototype(ffi.TVMFFIFunctionCall, pointer, pointer, integer, pointer)
        self._global = _prototype(ffi.TVMFFIFunctionGetGlobal, pointer, pointer)
        self._from_dlpack = _prototype(
            ffi.TVMFFITensorFromDLPack, pointer, integer, integer, pointer
        )
        self._raised = _prototype(ffi.TVMFFIErrorMoveFromRaised, pointer)
        self._release = _prototype(ffi.TVMFFIObjectDecRef, pointer)
        self._functions: dict[str, Object] = {}
        try:
            self._threads = ctypes.PYFUNCTYPE(ctypes.c_int)((_THREADS, runtime))
            self._set_threads = ctypes.PYFUNCTYPE(None, ctypes.c_int)((_SET_THREADS, runtime))
        except AttributeError:  # they are TVM's own, and no part of its C ABI
            self._threads = None

    @property
    def runs_alone(self) -> bool:
        """Whether `alone` may be called."""
        return self._threads is not None

    def alone(self, function):
        """Return what `function` returns, whose kernels run in this thread and in no other.

        How many threads TVM uses is a number of each thread that calls it, and is so afterwards
        as before.
        """
        before = self._threads()
        self._set_threads(1)
        try:
            return function()
        finally:
            self._set_threads(before)

    def function(self, name: str) -> Object:
        """Return the global function `name`."""
        if name not in self._functions:
            text, handle = name.encode(), ctypes.c_void_p()
            data = ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p)
            self._check(self._global(ctypes.byref(_Bytes(data, len(text))), ctypes.byref(handle)))
            if not handle.value:
                raise PlatformError(f"the TVM runtime has no function {name}")
            self._functions[name] = Object(0, handle.value, self._release)
        return self._functions[name]

    def call(self, function: Object, *arguments):
        """Call with integers, bytes and objects; return None, an integer or an Object."""
        return self.call_packed(function, self.pack(arguments))

    @staticmethod
    def pack(arguments) -> ctypes.Array:
        """Lay arguments out as the C ABI wants them; they must live as long as the result."""
        packed = (_Any * len(arguments))()
        for index, argument in enumerate(arguments):
            set_argument(packed[index], argument)
        return packed

    def call_packed(self, function: Object, packed: ctypes.Array):
        """Call with what `pack` has made; the result is as that of `call`."""
        result = _Any()
        self._check(self._call(function.handle, packed, len(packed), ctypes.byref(result)))
        if result.kind >= _OBJECT:
            return Object(result.kind, result.value.pointer, self._release)
        return None if result.kind == _NONE else result.value.integer

    def tensor(self, array: np.ndarray) -> Object:
        """Return a tensor on the memory of an aligned, contiguous array of numbers."""
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        return self.tensor_at(array, array.shape, code, array.itemsize * 8)

    def tensor_at(self, memory: np.ndarray, shape, code: int, bits: int) -> Object:
        """Return a tensor on `memory`, which is kept as long as the tensor."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        cpu, device, lanes = 1, 0, 1
        inner = DLTensor(address_of(memory), cpu, device, len(shape), code, bits, lanes, sizes)
        managed, handle = DLManagedTensor(inner), ctypes.c_void_p()
        status = self._from_dlpack(ctypes.byref(managed), ALIGNMENT, 1, ctypes.byref(handle))
        self._check(status)
        return Object(_TENSOR, handle.value, self._release, (memory, sizes, managed))

    def text(self, result) -> str:
        """Return the text of a string of TVM that is too long to lie in the result itself."""
        if not isinstance(result, Object) or result.kind != _STRING:
            raise BertileError("a text was expected, and none came")
        return _text(result)

    def arrays(self, result: Object, count: int) -> list[np.ndarray]:
        """Copy the tensors of a TVM array, which must be `count`, into new numpy arrays."""
        items = self._items(result)
        if len(items) != count:
            raise BundleError(
                f"the library gives {len(items)} outputs, the manifest names {count}", AGAIN
            )
        return [_copy(item) for item in items]

    def views(self, result: Object) -> list[np.ndarray]:
        """Return numpy arrays on the memory of the tensors of a TVM array, which they keep."""
        return [_view(item, result) for item in self._items(result)]

    def _items(self, result: Object) -> list[DLTensor]:
        """The tensors of a TVM array, which live as long as it does."""
        if not isinstance(result, Object) or result.kind != _ARRAY:
            raise BundleError("the library gives no list of outputs", AGAIN)
        listed = _Sequence.from_address(result.handle + _HEADER)
        items = [listed.items[number] for number in range(listed.size)]
        if any(item.kind != _TENSOR for item in items):
            raise BundleError("the library gives an output that is no tensor", AGAIN)
        return [DLTensor.from_address(item.value.pointer + _HEADER) for item in items]

    def resize_pool(self, threads: int) -> None:
        """Give the calling thread a pool of `threads` threads, or shrink the one it has."""
        try:
            cores = sorted(os.sched_getaffinity(0))[:threads]
        except AttributeError:
            cores = list(range(threads))
        names = [str(core).encode() for core in cores]
        listed = self.call(self.function("ffi.Array"), *names)
        # -3: the pool has as many threads as the list is long, and they may share those cores
        self.call(self.function("runtime.config_threadpool"), -3, threads, listed)

    def _check(self, code: int) -> None:
        if not code:
            return
        handle = ctypes.c_void_p()
        self._raised(ctypes.byref(handle))
        message = "no reason was reported"
        if handle.value:
            error = Object(0, handle.value, self._release)
            message = _text(error, skip=1).strip()
        raise BertileError(f"TVM reports: {' '.join(message.split())[:500]}")


def set_argument(slot: _Any, argument) -> None:
    """Write an integer, bytes or an object into one of the slots that `Runtime.pack` returns."""
    if isinstance(argument, Object):
        slot.kind, slot.value.pointer = argument.kind, argument.handle
    elif isinstance(argument, bytes):
        slot.kind, slot.value.text = _RAW_STR, argument
    else:
        slot.kind = _BOOL if isinstance(argument, bool) else _INT
        slot.value.integer = argument


def _prototype(function, *types):
    function.argtypes, function.restype = types, ctypes.c_int
    return function


def _text(owner: Object, skip: int = 0) -> str:
    """One of the texts with which an object begins."""
    text = _Bytes.from_address(owner.handle + _HEADER + skip * ctypes.sizeof(_Bytes))
    return ctypes.string_at(text.data, text.size).decode(errors="replace")


def _view(source: DLTensor, owner: Object) -> np.ndarray:
    shape, dtype = tuple(source.shape[: source.rank]), _DTYPES_OF[source.code, source.bits]
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(
        source.data + source.offset
    )
    memory.keep = owner
    return np.frombuffer(memory, dtype).reshape(shape)


def _copy(source: DLTensor) -> np.ndarray:
    out = np.empty(tuple(source.shape[: source.rank]), _DTYPES_OF[source.code, source.bits])
    ctypes.memmove(address_of(out), source.data + source.offset, out.nbytes)
    return out
