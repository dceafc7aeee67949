"""Lays arrays out so that every one starts on a cache line, as compiled kernels want them."""

from __future__ import annotations

import ctypes
import math

import numpy as np

ALIGNMENT = 64  # bytes; kernels load whole cache lines, so every tensor must start on one


def empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return an aligned array of any contents."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -address_of(raw) % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the array if it is aligned, contiguous and of that dtype, else such a copy of it."""
    fits = array.dtype == dtype and array.flags.c_contiguous
    if fits and address_of(array) % ALIGNMENT == 0:
        return array
    out = empty(array.shape, dtype)
    out[...] = array
    return out


_BYTE = ctypes.c_char


def address_of(array: np.ndarray) -> int:
    """Return the address of the first byte of an array."""
    try:  # four times as fast as array.ctypes.data
        return ctypes.addressof(_BYTE.from_buffer(array))
    except (TypeError, ValueError):  # read-only, or empty
        return array.ctypes.data
