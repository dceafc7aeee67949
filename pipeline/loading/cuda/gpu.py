"""Holds one GPU of this process: calls its driver, names its errors, hands out its memory."""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np

from bertile.loading.cuda.driver import ADDRESS, FUNCTIONS, INT, POINTER, SIZE
from bertile.loading.errors import BertileError, InputError, PlatformError

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
# After one of these the driver answers every later call of the process with the same error.
_FAULTS = {214, 220, 700, 702, 710, *range(714, 720)}
_LOST = "start the process again: it has lost the GPU"
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute
OWN_STREAM, NO_TIMING = 1, 2  # CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING
LEGACY = 1  # DLPack's name, and the driver's, of the legacy default stream


class DriverError(BertileError):
    """What a function of the driver answers, with its CUresult."""

    def __init__(self, what: str, code: int, remedy: str = ""):
        super().__init__(what, remedy)
        self.code = code

    def __reduce__(self):
        return type(self), (self.what, self.code, self.remedy)


class OutOfMemory(BertileError):
    """The GPU's memory does not hold what is asked for."""


class Gpu:
    """One GPU of this process: its driver, and its primary context, which torch and cupy share.

    The context is the current one of a thread inside `with gpu`.
    """

    context, _process = None, 0  # nobody's, until there is a driver

    def __init__(self, driver: ctypes.CDLL, ordinal: int = 0):
        self._functions = {name: getattr(driver, name) for name in FUNCTIONS}
        self.context, self._process, self._fault = POINTER(), os.getpid(), ""
        self.name, self.ordinal = "the GPU", ordinal
        # kernels are brought to the device when they are first used, not all of a module at once
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        code = self._functions["cuInit"](0)
        if code == _NO_DEVICE:
            raise PlatformError(
                "the NVIDIA driver sees no GPU", "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        if code:
            raise PlatformError(
                f"the NVIDIA driver does not start: {self._text(code)}", "look at nvidia-smi"
            )
        self.driver = self._number("cuDriverGetVersion")  # 12040 is CUDA 12.4
        count = self._number("cuDeviceGetCount")
        if type(ordinal) is not int or not 0 <= ordinal < count:
            known = "GPU 0" if count == 1 else f"GPUs 0 to {count - 1}"
            raise InputError(f"device is {ordinal!r}", f"this machine has {known}")
        self._device = self._number("cuDeviceGet", ordinal)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), self._device)
        self.name = text.value.decode(errors="replace")
        self.capability = (self.attribute(_MAJOR), self.attribute(_MINOR))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self._device)

    def call(self, name: str, *arguments) -> None:
        """Call a function of the driver; raises BertileError for what it answers."""
        code = self._functions[name](*arguments)
        if code:
            raise self._error(name, code)

    def drop(self, name: str, *arguments) -> None:
        """Give something back, whatever state the device is in; from any thread."""
        if os.getpid() != self._process or not self.context:
            return
        if not self._functions["cuCtxPushCurrent_v2"](self.context):
            self._functions[name](*arguments)
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(POINTER()))

    def check(self) -> None:
        """Raise BertileError where this process cannot use the GPU any more."""
        if self._fault:
            raise BertileError(self._fault, _LOST)
        if os.getpid() != self._process:
            raise BertileError(
                "the process was forked after the bundle was loaded",
                "load the bundle in the new process, and start that with 'spawn'",
            )

    def __enter__(self) -> Gpu:
        self.call("cuCtxPushCurrent_v2", self.context)
        return self

    def __exit__(self, *exception) -> None:
        self._functions["cuCtxPopCurrent_v2"](ctypes.byref(POINTER()))

    def __del__(self):
        ended = sys.is_finalizing() or os.getpid() != self._process
        if self.context and not ended:
            self._functions["cuDevicePrimaryCtxRelease_v2"](self._device)

    def attribute(self, number: int) -> int:
        """One of the device's CUdevice_attributes."""
        return self._number("cuDeviceGetAttribute", number, self._device)

    def handle(self, name: str, *arguments) -> int:
        """Call a function that makes something; return its handle."""
        handle = POINTER()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value

    def allocate(self, size: int, what: str) -> int:
        """Return the address of `size` bytes on the device."""
        address = ADDRESS()
        code = self._functions["cuMemAlloc_v2"](ctypes.byref(address), max(size, 1))
        if code == _OUT_OF_MEMORY:
            free, total = SIZE(), SIZE()
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            raise OutOfMemory(
                f"{self.name} has too little memory: {what} need {_mib(size)} MiB, "
                f"{_mib(free.value)} of {_mib(total.value)} MiB are free",
                "take smaller batches, or end what else uses the GPU",
            )
        if code:
            raise self._error("cuMemAlloc_v2", code)
        return address.value

    def pin(self, size: int) -> int:
        """Return the address of `size` bytes of this machine's memory that the device can copy."""
        address = POINTER()
        code = self._functions["cuMemHostAlloc"](ctypes.byref(address), max(size, 1), 0)
        if code == _OUT_OF_MEMORY:
            raise BertileError(
                f"this machine has too little memory: {_mib(size)} MiB cannot be pinned",
                "take smaller batches",
            )
        if code:
            raise self._error("cuMemHostAlloc", code)
        return address.value

    def _number(self, name: str, *arguments) -> int:
        number = INT()
        self.call(name, ctypes.byref(number), *arguments)
        return number.value

    def _error(self, name: str, code: int) -> DriverError:
        if code in _FAULTS:
            self._fault = f"a kernel failed on {self.name}: {self._text(code)}"
            return DriverError(self._fault, code, _LOST)
        return DriverError(f"{name} fails on {self.name}: {self._text(code)}", code)

    def _text(self, code: int) -> str:
        texts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if not self._functions[name](code, ctypes.byref(text)) and text.value:
                texts.append(text.value.decode(errors="replace"))
        return " (".join(texts) + ")" * (len(texts) - 1) if texts else f"error {code}"


def host_memory(address: int, size: int) -> np.ndarray:
    """The bytes at an address of this process."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def _mib(size: int) -> int:
    return -(-size >> 20)
