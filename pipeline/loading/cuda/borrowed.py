"""Takes inputs that lie on the device, from torch, cupy or whatever else exports DLPack."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import numpy as np

from bertile.loading.cuda.device_array import CAPSULE, ON_GPU
from bertile.loading.cuda.driver import POINTER
from bertile.loading.cuda.gpu import LEGACY, Gpu
from bertile.loading.errors import InputError
from bertile.loading.inputs import check_names
from bertile.loading.tvm_abi import DLManagedTensor

_MANAGED = 13  # a DLDeviceType: memory that moves between the GPU and this machine


def on_device(value) -> bool:
    if value is None or isinstance(value, (np.ndarray, list, tuple)):
        return False
    place = getattr(value, "__dlpack_device__", None)
    return place is not None and place()[0] in (ON_GPU, _MANAGED)


class Borrowed(NamedTuple):
    pointer: int
    shape: tuple[int, ...]


def borrow_all(inputs: dict, specs: list[dict], gpu: Gpu, stream: int) -> dict[str, Borrowed]:
    """Where the given arrays lie on the device; each (batch, length), of one shape, checked."""
    named = check_names(inputs, specs)
    dtypes = {spec["name"]: np.dtype(spec["dtype"]) for spec in specs}
    borrowed = {
        name: _borrow(name, value, dtypes[name], gpu, stream) for name, value in named.items()
    }
    first, (_, shape) = next(iter(borrowed.items()))
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{first} has shape {shape}", "give (batch, length), for one text [ids]")
    for name, array in borrowed.items():
        if array.shape != shape:
            raise InputError(f"{name} has shape {array.shape}, but {first} has {shape}")
    return borrowed


def _borrow(name: str, value, dtype: np.dtype, gpu: Gpu, stream: int) -> Borrowed:
    if not on_device(value):
        raise InputError(f"{name} is not on the GPU, but another input is", "give all on one")
    number = value.__dlpack_device__()[1]
    if number != gpu.ordinal:
        raise InputError(f"{name} is on GPU {number}, the model is on GPU {gpu.ordinal}")
    capsule = value.__dlpack__(stream=stream or LEGACY)
    tensor = DLManagedTensor.from_address(_capsule_pointer()(capsule, CAPSULE)).tensor
    shape = tuple(tensor.shape[: tensor.rank])
    if (tensor.code, tensor.bits, tensor.lanes) != ("iu".index(dtype.kind), dtype.itemsize * 8, 1):
        raise InputError(f"{name} is not {dtype}", f"convert it, as with .to(torch.{dtype})")
    if tensor.strides:
        strides, step = tensor.strides[: tensor.rank], 1
        for size, stride in zip(reversed(shape), reversed(strides)):
            if size > 1 and stride != step:
                raise InputError(f"{name} is not contiguous", "give it with .contiguous()")
            step *= size
    return Borrowed(tensor.data + tensor.offset, shape)


@functools.cache
def _capsule_pointer():
    function = ctypes.pythonapi["PyCapsule_GetPointer"]
    function.argtypes, function.restype = (ctypes.py_object, ctypes.c_char_p), POINTER
    return function
