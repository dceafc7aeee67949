"""A bundle for an NVIDIA GPU comes in, a callable from token ids to arrays goes out.

On numpy, ctypes and the driver's own library (libcuda.so.1), with what `loader` has. It is
`bertile.cuda_loader`, and copied into a bundle it lies beside the `loader.py` that calls it.
"""

from __future__ import annotations

import ast
import ctypes
import functools
from collections.abc import Iterable, Mapping
from typing import Union

if __package__:
    from bertile.loader import BundleError, PlatformError
else:
    from loader import BundleError, PlatformError

Extent = Union[int, str]

# -- extents -----------------------------------------------------------------------------------

_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Load, ast.Constant,
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.USub, ast.Lt, ast.GtE,
)  # fmt: skip
_LONGEST = 1000  # characters of an extent; deeper nesting than that holds would end the parser


def evaluate(extent: Extent, symbols: Mapping[str, int]) -> int:
    """Return the value of an extent: an integer, or text over the names of `symbols`.

    Text may hold + - * // and parentheses, and < and >=, which give 1 or 0. Raises BundleError
    for anything else.
    """
    if type(extent) is int:
        return extent
    if not isinstance(extent, str):
        raise _no_extent(extent, symbols)
    try:
        return int(_compiled((extent,), tuple(symbols))(*symbols.values())[0])
    except ZeroDivisionError as error:
        raise BundleError(f"'{extent}' divides by zero", "compile the bundle again") from error


@functools.lru_cache(maxsize=4096)
def _compiled(extents: tuple[Extent, ...], names: tuple[str, ...]):
    """A function of the symbols that gives the values of all extents at once."""
    for extent in extents:
        _check_extent(extent, names)
    text = "".join(f"({extent}), " for extent in extents)
    return eval(f"lambda {', '.join(names)}: ({text})", {"__builtins__": {}})


def _check_extent(extent: Extent, names: tuple[str, ...]) -> None:
    """Only what `_ALLOWED` lists is ever compiled: a bundle's plan must not run code of its own."""
    if type(extent) is int:
        return
    if not isinstance(extent, str) or len(extent) > _LONGEST:
        raise _no_extent(extent, names)
    try:
        tree = ast.parse(extent, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_extent(extent, names) from error
    for node in ast.walk(tree):
        known = isinstance(node, _ALLOWED)
        if isinstance(node, ast.Constant):
            known = type(node.value) is int and node.value < 1 << 62
        elif isinstance(node, ast.Name):
            known = node.id in names
        if not known:
            raise _no_extent(extent, names)


def _no_extent(extent: object, names: Iterable[str]) -> BundleError:
    return BundleError(
        f"the plan has the extent {str(extent)[:80]!r}, no arithmetic over {', '.join(names)}",
        "compile the bundle again",
    )


# -- the driver --------------------------------------------------------------------------------

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_UNSIGNED, _ADDRESS, _LONG = ctypes.c_uint, ctypes.c_uint64, ctypes.c_ulonglong


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", _POINTER),
        ("grid", _UNSIGNED * 3),
        ("block", _UNSIGNED * 3),
        ("shared", _UNSIGNED),
        ("arguments", _POINTER),  # void**
        ("extra", _POINTER),
    )


class MemcpyNode(ctypes.Structure):
    """CUDA_MEMCPY3D_v2, of which a copy of bytes in one row uses a part."""

    _fields_ = (
        ("source_place", _SIZE * 4),  # x in bytes, y, z, level
        ("source_kind", _INT),  # 1 host, 2 device
        ("source_host", _POINTER),
        ("source_device", _ADDRESS),
        ("source_rest", _SIZE * 4),  # array, reserved, pitch, height
        ("target_place", _SIZE * 4),
        ("target_kind", _INT),
        ("target_host", _POINTER),
        ("target_device", _ADDRESS),
        ("target_rest", _SIZE * 4),
        ("bytes", _SIZE),
        ("height", _SIZE),
        ("depth", _SIZE),
    )


# Every function of the driver that is called, with the types of its parameters: pointers to what
# is written and handles are _POINTER, addresses on the device _ADDRESS.
FUNCTIONS = {
    "cuInit": (_UNSIGNED,),
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_POINTER, _INT, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_POINTER, _SIZE, _UNSIGNED),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuModuleLoadDataEx": (_POINTER, _POINTER, _UNSIGNED, _POINTER, _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (_POINTER, _POINTER, ctypes.c_char_p),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuStreamCreate": (_POINTER, _UNSIGNED),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _UNSIGNED),
    "cuEventCreate": (_POINTER, _UNSIGNED),
    "cuEventDestroy_v2": (_POINTER,),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventQuery": (_POINTER,),
    "cuEventSynchronize": (_POINTER,),
    "cuEventElapsedTime": (_POINTER, _POINTER, _POINTER),
    "cuGraphCreate": (_POINTER, _UNSIGNED),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphAddKernelNode": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER),
    "cuGraphAddMemcpyNode": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, _LONG),
    "cuGraphExecKernelNodeSetParams": (_POINTER, _POINTER, _POINTER),
    "cuGraphExecDestroy": (_POINTER,),
    "cuGraphLaunch": (_POINTER, _POINTER),
}


def open_driver(path: str | None = None) -> ctypes.CDLL:
    """Return the driver's library with the prototypes of FUNCTIONS; raises PlatformError."""
    try:
        library = ctypes.CDLL(path or "libcuda.so.1")
    except OSError as error:
        raise PlatformError(
            f"the NVIDIA driver's library cannot be loaded: {error}",
            "this bundle needs a machine with an NVIDIA GPU and its driver",
        ) from error
    for name, types in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise PlatformError(
                f"the NVIDIA driver is too old: it has no {name}", "update it to 470 or newer"
            ) from error
        function.argtypes, function.restype = types, ctypes.c_int
    return library
